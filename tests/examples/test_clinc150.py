import json
from collections import Counter

import pytest

from tests.conftest import REAL_DATA
from tests.examples.clinc150 import records


def test_each_domain_is_in_one_split_and_queries_of_all_parts_are_there():
    domains = {f"domain {letter}": [f"{letter}1", f"{letter}2"] for letter in "jihgfedcba"}
    queries = {
        part: [(f"{intent} of {part}", intent) for own in domains.values() for intent in own]
        for part in ("train", "val", "test")
    } | {"oos_test": [("none of them", "oos")]}
    found = records(queries, domains)
    assert Counter(record["split"] for record in found) == {"train": 36, "validation": 12, "test": 12}
    assert {record["domain"] for record in found if record["split"] == "test"} == {"domain i", "domain j"}
    assert all(record["text"].startswith(record["intent"]) for record in found)


def test_the_real_ones_have_150_queries_of_each_intent():
    folder = REAL_DATA / "clinc150"
    if not folder.is_dir():
        pytest.skip(f"no CLINC150 in {folder}: put data_full.json and domains.json there")
    found = records(*(json.loads((folder / name).read_text()) for name in ("data_full.json", "domains.json")))
    assert set(Counter(record["intent"] for record in found).values()) == {150}
    assert {record["domain"] for record in found if record["split"] == "test"} == {"utility", "work"}
