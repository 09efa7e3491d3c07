import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadist.core.errors import InputError
from metadist.data import Tokenizer, open_dataset
from metadist.data.importers import text

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
    refused(write(tmp_path, "jsonl", mixed), tmp_path, "label 'pay' is in two splits", split_column="part")
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(tmp_path / "empty.jsonl", tmp_path, "holds no rows")


def noted(path: Path) -> dict[str, int]:
    return {note["what"]: note["count"] for note in open_dataset(path).metadata["notes"]}


def test_what_a_text_import_cuts_is_said(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", rows())
    out = text(source, tmp_path / "set", split_column="part", length=4)
    notes = {note["what"]: note for note in open_dataset(out).metadata["notes"]}
    # "book a flight number 2!" has 6 words, pay and save have 7 or more; "z" and "h" are in no text of train
    assert notes["texts cut"]["count"] == 20 and "--length" in notes["texts cut"]["remedy"]
    longest = int(notes["texts cut"]["remedy"].split()[1])
    assert "texts cut" not in noted(text(source, tmp_path / "whole", split_column="part", length=longest))
    assert "texts cut" in noted(text(source, tmp_path / "cut", split_column="part", length=longest - 1))
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
