import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from metadist import MAML, Model, TaskId
from metadist.data import ClassSource, Tokenizer, importers, open_dataset
from metadist.learners import Fast
from metadist.models.losses import cross_entropy
from tests.conftest import REAL_DATA
from tests.examples.clinc150 import VOCABULARY, intents, records


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


class ByToken(nn.Module):
    """Each token adds its row of the table to the logits."""

    def __init__(self, vocabulary_size: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocabulary_size, 2))

    def forward(self, tokens, mask):
        return (self.table[tokens] * mask.unsqueeze(2)).sum(dim=1)


@pytest.fixture
def two_intents(tmp_path, monkeypatch):
    """A task of two intents of three queries, whose words are those of their intent but for one; and the vocabulary."""
    words = {"pay": "abc", "call": "def"}
    texts = {intent: [f"{letter} $x_{letter}" for letter in letters] for intent, letters in words.items()}
    lines = [
        {"text": text, "intent": intent, "domain": "home", "split": split}
        for split in ("train", "test")
        for intent, own in texts.items()
        for text in own
    ]
    lines = [{**each, "intent": f"{each['intent']} {each['split']}"} for each in lines]
    (tmp_path / "clinc150.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    monkeypatch.chdir(tmp_path)
    importers.text("clinc150.jsonl", "data/clinc150", label="intent", parent="domain", split_column="split")
    source = ClassSource(open_dataset("data/clinc150").splits, shots=1, queries=2, seed=0, ways=2)
    return source(TaskId("test", 0, 0)), Tokenizer.load(VOCABULARY)


@pytest.mark.parametrize("known", [True, False])
def test_the_figure_has_what_queries_are_taken_for_and_the_sentences_that_are_wrong(two_intents, tmp_path, known):
    """Before adaptation all are taken for the first intent, after it all of one intent and one query of the other."""
    task, tokenizer = two_intents
    if not known:
        (tmp_path / "clinc150.jsonl").unlink()
    learner = MAML(model=Model(ByToken(len(tokenizer.pieces))), loss=cross_entropy)
    first, after = torch.zeros(2, len(tokenizer.pieces), 2)
    first[:, 0] = 1
    for tokens, mask, label in zip(*task.query.inputs, task.query.targets[0], strict=True):
        after[tokens[mask], int(label)] = 1
    wrong = task.query.inputs[0][task.query.targets[0] == 1][0]
    letter = int(wrong[0])
    after[letter] = torch.tensor([9.0, 0.0])
    theta = {"table": first}
    figure = intents(learner, theta, [Fast(theta, {}), Fast({"table": after}, {})], task.map(torch.from_numpy))
    before, later, sentences = figure.axes
    assert before.get_title() == "before adaptation: 2 of 4 right"
    assert later.get_title() == "after adaptation: 3 of 4 right"
    np.testing.assert_array_equal(before.images[0].get_array(), [[2, 0], [2, 0]])
    np.testing.assert_array_equal(later.images[0].get_array(), [[2, 0], [1, 1]])
    names = [each.get_text() for each in before.get_yticklabels()]
    text, named = sentences.texts[0].get_text().split("\n")
    of = "pay test" if tokenizer.pieces[letter] in "abc" else "call test"
    other = "call test" if of == "pay test" else "pay test"
    if known:
        assert names == [other, of] and named.strip() == f"{of}, taken for {other}"
        assert text == f"{tokenizer.pieces[letter]} $x_{tokenizer.pieces[letter]}"
    else:
        assert names == ["intent 0", "intent 1"] and text.split()[0] == str(letter)
    figure.canvas.draw()
