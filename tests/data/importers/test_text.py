import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadist.data import Tokenizer, open_dataset
from metadist.data.importers import text
from metadist.errors import InputError

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
    assert dataset.metadata["extra"] == {"vocabulary_size": len(tokenizer.pieces)}
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
    refused(source, tmp_path, "no column 'lable' .did you mean 'label'.*it has text, label", label="lable")
    refused(source, tmp_path, "says split 'bank'", split_column="domain")
    refused(source, tmp_path, "label 'pay' has two parents", parent="text")
    refused(source, tmp_path, "no label of .* is in train", fractions=(0, 0.5, 0.5))
    refused(tmp_path / "nowhere.csv", tmp_path, "cannot be read")
    refused(tmp_path / "source.pdf", tmp_path, "convert it")
    mixed = [{**row, "part": ("train", "test")[n % 2]} for n, row in enumerate(rows()[:1] * 4)]
    refused(write(tmp_path, "jsonl", mixed), tmp_path, "label 'pay' is in two splits", split_column="part")
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(tmp_path / "empty.jsonl", tmp_path, "holds no rows")
