import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metadist.core.errors import InputError
from metadist.data import Tokenizer, open_dataset
from metadist.data.importers import text
from tests.cli.command import run

TOPICS = {
    "pay": ("bank", "train", "please pay my bill"),
    "save": ("bank", "train", "put money aside, please"),
    "fly": ("travel", "validation", "book a flight"),
    "stay": ("travel", "test", "book a zebra hotel"),
}


def rows() -> list[dict[str, str]]:
    return [
        {"text": f"{said} number {n}!", "label": label, "domain": domain, "part": part}
        for n in range(5)
        for label, (domain, part, said) in TOPICS.items()
    ]


def write(tmp_path: Path, suffix: str, records: list[dict[str, Any]]) -> Path:
    file = tmp_path / f"source.{suffix}"
    if suffix in ("csv", "tsv"):
        mark = "," if suffix == "csv" else "\t"
        lines = [mark.join(records[0]), *(mark.join(f'"{v}"' for v in record.values()) for record in records)]
    else:
        lines = [json.dumps(record) for record in records]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_texts_become_tokens_with_a_mask(tmp_path: Path, suffix: str) -> None:
    source = write(tmp_path, suffix, rows())
    out = text(source, tmp_path / "set", parent="domain", split_column="part", length=12, vocabulary_size=300)
    dataset = open_dataset(out, verify=True)
    assert dataset.kind == "classes" and [field.name for field in dataset.fields] == ["tokens", "tokens_mask"]
    assert {split: table.group_names for split, table in dataset.splits.items()} == {
        "train": ["pay", "save"],
        "validation": ["fly"],
        "test": ["stay"],
    }
    assert dataset.splits["test"].parent_names == ["travel"]
    tokenizer = Tokenizer.load(out / "vocabulary.json")
    assert dataset.metadata["extra"]["vocabulary_size"] == len(tokenizer.pieces)
    assert "zebra" not in tokenizer.pieces and "please" in tokenizer.pieces  # the vocabulary is the train split's
    (tokens, mask), targets = dataset.splits["train"].gather(np.arange(5))
    assert tokens.dtype == np.int32 and mask.dtype == bool and targets == ()
    said = [tokenizer.pieces[number] for number in tokens[2][mask[2]]]
    assert said == ["please", "pay", "my", "bill", "number", "2", "!"]
    np.testing.assert_array_equal(mask, tokens != 0)


def test_labels_are_divided_where_no_column_does(tmp_path: Path) -> None:
    source = write(tmp_path, "csv", rows())
    one = open_dataset(text(source, tmp_path / "one", seed=5))
    assert [len(table.group_names) for table in one.splits.values()] == [2, 1, 1]
    assert open_dataset(text(source, tmp_path / "two", seed=5)).digest == one.digest


def refused(source: Path, tmp_path: Path, message: str, **asked: Any) -> None:
    with pytest.raises(InputError, match=message):
        text(source, tmp_path / "out" / "set", **asked)
    assert not (tmp_path / "out").exists()


def test_broken_lines_are_named(tmp_path: Path) -> None:
    good = [json.dumps(row) for row in rows()]
    source = tmp_path / "source.jsonl"
    for bad, message in (
        ("{", r"line 3 of .* is not JSON"),
        ("[1]", r"line 3 of .* is not a JSON object"),
        ('{"text": "a"}', r"line 3 of .* has no column 'label'"),
        ('{"text": "a", "label": null}', r"line 3 of .* no usable value for 'label'"),
        ('{"text": " ", "label": "pay"}', r"line 3 of .* no usable value for 'text'"),
    ):
        source.write_text("\n".join([*good[:2], bad, *good[2:]]))
        refused(source, tmp_path, message)
    source.write_bytes(b'{"text": "\xff", "label": "x"}')
    refused(source, tmp_path, "is not UTF-8 text")
    csv = tmp_path / "source.csv"
    csv.write_text('text,label\nhello,a\n"open,b\n')
    refused(csv, tmp_path, r"line 3 of .* is no CSV")
    csv.write_text("text,label\nhello,a\nhello\n")
    refused(csv, tmp_path, r"line 3 of .* fields than the header")


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, "csv", rows())
    refused(source, tmp_path, "no column 'lable'; it has text, label.*did you mean label", label="lable")
    refused(source, tmp_path, "says split 'bank'", split_column="domain")
    refused(source, tmp_path, "label 'pay' has two parents", parent="text")
    refused(source, tmp_path, "no label of .* is in train", fractions=(0, 0.5, 0.5))
    refused(tmp_path / "nowhere.csv", tmp_path, "cannot be read")
    refused(tmp_path / "source.pdf", tmp_path, "convert it")
    mixed = [{**row, "part": ("train", "test")[n % 2]} for n, row in enumerate(rows()[:1] * 4)]
    refused(
        write(tmp_path, "jsonl", mixed), tmp_path, "1 of 1 labels .* in two splits .'pay' first", split_column="part"
    )
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(tmp_path / "empty.jsonl", tmp_path, "holds no rows")


def noted(path: Path) -> dict[str, int]:
    return {note["what"]: note["count"] for note in open_dataset(path).metadata["notes"]}


def test_what_a_text_import_cuts_is_said(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", rows())
    out = text(source, tmp_path / "set", split_column="part", length=4)
    notes = {note["what"]: note for note in open_dataset(out).metadata["notes"]}
    # "book a flight number 2!" has 6 words, pay and save have 7 or more; "z" and "h" are in no text of train
    assert notes["texts cut"]["count"] == 20 and "keeps all texts whole" in notes["texts cut"]["remedy"]
    longest = int(notes["texts cut"]["remedy"].split()[1])
    assert "texts cut" not in noted(text(source, tmp_path / "whole", split_column="part", length=longest))
    assert "texts cut" in noted(text(source, tmp_path / "cut", split_column="part", length=longest - 1))
    told = [{"text": "a " * 3, "label": f"l{n % 3}"} for n in range(198)]
    told += [{"text": "a " * long, "label": "l0"} for long in (5, 5, 900)]
    (tmp_path / "tail.jsonl").write_text("\n".join(map(json.dumps, told)))
    notes = open_dataset(text(tmp_path / "tail.jsonl", tmp_path / "tail", length=4)).metadata["notes"]
    assert [n["remedy"] for n in notes if n["what"] == "texts cut"] == ["--length 5 keeps 99.5% of all texts whole"]


def test_tokens_that_train_has_not_are_said(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", rows())
    out = text(source, tmp_path / "set", split_column="part", length=4)
    notes = {note["what"]: note for note in open_dataset(out).metadata["notes"]}
    assert notes["tokens unknown"]["count"] >= 5  # the z of every zebra


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_labels_that_differ_by_spaces_or_unicode_form_are_one(tmp_path: Path, suffix: str) -> None:
    records = [
        {"text": f"text number {n}", "label": ["é", "e\u0301", " é", "b", "b ", "b\u00a0", "c", "C"][n % 8]}
        for n in range(64)
    ]
    out = text(write(tmp_path, suffix, records), tmp_path / "set", fractions=(1, 0, 0))
    table = open_dataset(out).splits["train"]
    assert dict(zip(table.group_names, table.counts.tolist(), strict=True)) == {"é": 24, "b": 24, "c": 8, "C": 8}
    assert noted(out) == {"labels merged": 32, "labels kept apart": 1}


def test_equal_texts_of_a_label_and_of_two_labels_are_said(tmp_path: Path) -> None:
    records = [{"text": f"text {n}", "label": f"l{n % 4}"} for n in range(16)]
    records += [{"text": "Text 0", "label": "l0"}, {"text": "text 1", "label": "l2"}]
    out = text(write(tmp_path, "jsonl", records), tmp_path / "set", fractions=(1, 0, 0))
    assert noted(out) == {"rows repeated": 1, "rows shared": 1}


def test_all_unusable_lines_are_told_in_one_go_or_skipped(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows()]
    lines[2:2] = [
        "{", '{"text": "a", "label": null}', "[" * 100_000, '{"text": "\\ud800", "label": "x"}',
        '{"text": ' + "9" * 5000 + ', "label": "x"}', '{"text": "a"}', '{"text": "a", "label": NaN}',
    ]  # fmt: skip
    source = tmp_path / "source.jsonl"
    source.write_text("\n".join(lines))
    with pytest.raises(InputError) as caught:
        text(source, tmp_path / "set")
    for part in (
        "line 3 (", "not JSON", "line 4, line 9 (", "no usable value for 'label'", "line 5 (", "nested too deep",
        "line 6 (", "no usable value for 'text'", "line 7 (", "more than 4300 digits", "line 8 (", "no column",
        "7 of 27", "--skip-bad",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    out = text(source, tmp_path / "set", skip_bad=True)
    notes = open_dataset(out).metadata["notes"]
    assert sum(note["count"] for note in notes if note["what"] == "rows left out") == 7
    assert sum(table.num_rows for table in open_dataset(out).splits.values()) == 20


@pytest.mark.parametrize("form", ["semicolon", "tab", "utf-16", "bom", "gzip", "long", "spaces"])
def test_dialects_are_read(tmp_path: Path, form: str) -> None:
    plain = write(tmp_path, "csv", rows())
    expected = open_dataset(text(plain, tmp_path / "plain")).digest
    content, encoding = plain.read_text(), "utf-8"
    if form in ("semicolon", "tab"):
        content = content.replace('","', '";"' if form == "semicolon" else '"\t"')
        content = content.replace("text,label,domain,part", "text;label;domain;part" if form == "semicolon" else
                                  "text\tlabel\tdomain\tpart")  # fmt: skip
    if form == "spaces":
        content = content.replace("text,label", " text, label ")
    if form == "long":
        content = content.replace("text,label,domain,part", "text,label,domain,part,more").replace('"\n', '",x\n')
        content += f'"please pay",pay,bank,train,{"word " * 40_000}\n'
    encoding = {"utf-16": "utf-16", "bom": "utf-8-sig"}.get(form, encoding)
    source = tmp_path / f"other.csv{'.gz' * (form == 'gzip')}"
    source.write_bytes(gzip.compress(content.encode()) if form == "gzip" else content.encode(encoding))
    dataset = open_dataset(text(source, tmp_path / "set"))
    rows_read = sum(table.num_rows for table in dataset.splits.values())
    assert rows_read == (21 if form == "long" else 20)
    assert form == "long" or dataset.digest == expected


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    refused(tmp_path / "pipe.csv", tmp_path, "is a pipe and no regular file")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    refused(tmp_path / "zero.jsonl", tmp_path, "is a device and no regular file")
    (tmp_path / "endless.jsonl").write_bytes(b"x" * (1 << 25))
    refused(tmp_path / "endless.jsonl", tmp_path, "a line longer than 16 MiB")


SPLITS = {"train": ["pay", "save"], "validation": ["fly"], "test": ["stay"]}


def classes(out: Path) -> dict[str, list[str]]:
    return {split: table.group_names for split, table in open_dataset(out, verify=True).splits.items()}


def counts(out: Path) -> dict[str, int]:
    tables = open_dataset(out, verify=True).splits.values()
    return {name: int(count) for t in tables for name, count in zip(t.group_names, t.counts, strict=True)}


def write_split(folder: Path, names: dict[str, str]) -> list[Path]:
    """A JSON lines file per split, under these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in names.items():
        records = [json.dumps(row) for row in rows() if row["part"] == split]
        (folder / name).write_text("\n".join(records))
    return [folder / name for name in names.values()]


def test_files_named_for_splits_are_these_splits(tmp_path: Path) -> None:
    files = write_split(tmp_path / "in", {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test_1.jsonl"})
    (tmp_path / "in" / "README.md").write_text("hello")
    assert classes(text(tmp_path / "in", tmp_path / "folder")) == SPLITS
    assert noted(tmp_path / "folder")["files left out"] == 1
    assert classes(text(files, tmp_path / "files")) == SPLITS
    whole = write(
        tmp_path, "jsonl", [row for name in ("train", "validation", "test") for row in rows() if row["part"] == name]
    )
    assert (
        open_dataset(tmp_path / "files").digest
        == open_dataset(text(whole, tmp_path / "one", split_column="part")).digest
    )
    done = run(
        "data",
        "text",
        "--source",
        *["in/train.jsonl", "--source", "in/dev.jsonl", "--out", "set"],
        cwd=tmp_path,
    )
    assert done.returncode == 0 and classes(tmp_path / "set") == {"train": ["pay", "save"], "validation": ["fly"]}
    assert len(classes(text(files[0], tmp_path / "alone", fractions=(0.5, 0.5, 0)))) == 2  # a file alone is no split
    files[2].rename(tmp_path / "in" / "more.jsonl")
    refused(tmp_path / "in", tmp_path, "named for a split and .*more.jsonl beside it is not")  # type: ignore[arg-type]


def test_files_of_no_split_are_put_together_and_places_name_the_file(tmp_path: Path) -> None:
    write_split(tmp_path / "in", {"train": "a.jsonl", "validation": "b.jsonl", "test": "c.jsonl"})
    out = text(tmp_path / "in", tmp_path / "set", fractions=(1, 0, 0), length=2)
    assert counts(out) == {"pay": 5, "save": 5, "fly": 5, "stay": 5}
    notes = {note["what"]: note for note in open_dataset(out).metadata["notes"]}
    assert notes["texts cut"]["example"].startswith("line 1 of a.jsonl with")
    with (tmp_path / "in" / "b.jsonl").open("a") as file:
        file.write("\n{")
    refused(tmp_path / "in", tmp_path, "line 6 of b.jsonl is not JSON")


def test_splits_that_share_labels_are_explained_and_merged_on_demand(tmp_path: Path) -> None:
    for split, part in (("train", rows()[:12]), ("test", rows()[12:])):
        write(tmp_path, "csv", part).rename(tmp_path / f"{split}.csv")
    sources = [tmp_path / "train.csv", tmp_path / "test.csv"]
    with pytest.raises(InputError, match="4 of 4 labels .* in two splits .'pay' first.*--merge"):
        text(sources, tmp_path / "no")
    out = text(sources, tmp_path / "set", merge=True)
    assert counts(out) == {"pay": 5, "save": 5, "fly": 5, "stay": 5} and len(classes(out)) == 3
    assert noted(out)["splits of labels merged"] == 4


def test_folders_of_txt_files_are_classes(tmp_path: Path) -> None:
    for n, row in enumerate(rows()):
        for file in (
            tmp_path / "flat" / row["label"] / f"{n}.txt",
            tmp_path / "deep" / row["part"] / row["label"] / f"{n}.txt",
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(row["text"])
    out = text(tmp_path / "flat", tmp_path / "one", fractions=(1, 0, 0))
    assert counts(out) == {"pay": 5, "save": 5, "fly": 5, "stay": 5}
    assert classes(text(tmp_path / "deep", tmp_path / "two")) == SPLITS
    whole = write(tmp_path, "jsonl", rows())
    assert open_dataset(out).digest == open_dataset(text(whole, tmp_path / "three", fractions=(1, 0, 0))).digest
    (tmp_path / "flat" / "pay" / "0.txt").write_bytes(b"\xff\xfe\xff")
    refused(tmp_path / "flat", tmp_path, "pay/0.txt is not UTF-8")
    (tmp_path / "flat" / "pay" / "0.txt").write_text(" ")
    refused(tmp_path / "flat", tmp_path, "pay/0.txt has no usable value")
    refused(tmp_path / "nothing.txt", tmp_path, "convert it")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "holds no .csv, .* and no class folders")


LABELS = ["pay", "save", "fly", "stay"]
FEATURES = {"label": {"names": LABELS, "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}


@pytest.mark.parametrize("told", ["in the files", "dataset_infos.json", "README.md", "nowhere"])
def test_directories_of_hugging_face_data_sets(tmp_path: Path, told: str) -> None:
    (tmp_path / "in" / "data").mkdir(parents=True)
    for split in SPLITS:
        part = [row for row in rows() if row["part"] == split]
        content = pa.table(
            {"text": [row["text"] for row in part], "label": [LABELS.index(row["label"]) for row in part]}
        )
        if told == "in the files":
            content = content.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})
        pq.write_table(content, tmp_path / "in" / "data" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "in" / ".gitattributes").write_text("*.parquet lfs")
    readme = "---\nlicense: mit\n"
    if told == "README.md":
        names = "".join(f"          '{n}': {name}\n" for n, name in enumerate(LABELS))
        readme += (
            f"dataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n{names}"
        )
    (tmp_path / "in" / "README.md").write_text(f"{readme}---\n# Banking\n")
    if told == "dataset_infos.json":
        (tmp_path / "in" / told).write_text(json.dumps({"default": {"features": FEATURES, "splits": {}}}))
    out = text(tmp_path / "in", tmp_path / "set")
    if told == "nowhere":
        assert classes(out) == {"train": ["0", "1"], "validation": ["2"], "test": ["3"]}
    else:
        assert classes(out) == SPLITS and noted(out)["labels named"] == 20
    left_out = [note["count"] for note in open_dataset(out).metadata["notes"] if note["what"] == "files left out"]
    assert sum(left_out) == 2 + (told == "dataset_infos.json")


def test_a_description_that_cannot_be_read_or_grows_without_end_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    (tmp_path / "in" / "README.md").write_text("\n".join(["---", "a0: &a0 {name: label}", *lines, "---"]))
    (tmp_path / "in" / "dataset_info.json").write_text("{")
    content = pa.table({"text": [f"word {n}" for n in range(9)], "label": [n // 3 for n in range(9)]})
    pq.write_table(content.replace_schema_metadata({"huggingface": "{"}), tmp_path / "in" / "all.parquet")
    out = text(tmp_path / "in", tmp_path / "set", fractions=(0.4, 0.3, 0.3))
    assert sorted(sum(classes(out).values(), [])) == ["0", "1", "2"]


def test_damaged_parquet_and_absent_columns_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a b"], "intent": ["x"]}), tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", tmp_path, "no column 'label'; it has text, intent")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "t.parquet", tmp_path, "t.parquet cannot be read")
