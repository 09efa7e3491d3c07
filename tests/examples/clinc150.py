"""CLINC150 (Larson et al. 2019, github clinc/oos-eval) for few-shot learning of intents of unseen domains.

    python -m tests.examples.clinc150 data_full.json domains.json clinc150.jsonl

makes one JSON line of each query, its own train, validation and test parts together, which `metadist data text`
imports. Of the domains in alphabetical order the first six are for training, the next two for validation, the last two
for the test. Queries out of scope, which have no domain, are left out.

`intents` is a figure of `jobs/domains/clinc150_lora.yaml`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from metadist import Learner, Task
from metadist.data import Tokenizer
from metadist.learners import Fast

SPLITS = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
RECORDS, VOCABULARY = Path("clinc150.jsonl"), Path("data/clinc150/vocabulary.json")
"""What the job's head makes, from where it is run."""
MOST = 14  # sentences shown


def records(queries: dict[str, list[tuple[str, str]]], domains: dict[str, list[str]]) -> list[dict[str, str]]:
    """A record of each query with its text, intent, domain and split."""
    split = dict(zip(sorted(domains), SPLITS, strict=True))
    domain = {intent: name for name, intents in domains.items() for intent in intents}
    return [
        {"text": text, "intent": intent, "domain": domain[intent], "split": split[domain[intent]]}
        for part in ("train", "val", "test")
        for text, intent in queries[part]
    ]


def records_of(tokens: np.ndarray, mask: np.ndarray) -> list[dict[str, str]]:
    """The record of each tokenized query [n, length]; one without an intent, its text the numbers of its tokens, where
    the job's head was not followed in this folder."""
    known = {}
    if RECORDS.exists() and VOCABULARY.exists():
        tokenizer, length = Tokenizer.load(VOCABULARY), tokens.shape[1]
        for line in map(json.loads, RECORDS.read_text().splitlines()):
            known[tokenizer.encode(line["text"])[:length].tobytes()] = line
    ids = [row[here].astype(np.int32) for row, here in zip(tokens, mask, strict=True)]
    return [known.get(each.tobytes()) or {"text": " ".join(map(str, each)), "intent": ""} for each in ids]


def intents(learner: Learner, theta: dict[str, Tensor], fasts: Sequence[Fast], task: Task) -> Figure:
    """Which intent the queries of a task are taken for [column], by which they have [row], before and after adaptation,
    and the queries that are then taken for another."""
    support, query = ([value.numpy() for value in part.inputs] for part in task)
    labels, true = (part.targets[0].numpy() for part in task)
    ways, of_support = int(labels.max()) + 1, records_of(*support)
    names = [of_support[int(np.argmax(labels == way))]["intent"] or f"intent {way}" for way in range(ways)]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    *panels, text = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    taken = true
    for axes, name, fast in zip(panels, ("before adaptation", "after adaptation"), (fasts[0], fasts[-1]), strict=True):
        taken = learner.predict(theta, fast, task.query.inputs)[:, :ways].argmax(dim=1).numpy()
        confusion = np.zeros((ways, ways), int)
        np.add.at(confusion, (true, taken), 1)
        draw_confusion(axes, confusion, names)
        axes.set_title(f"{name}: {(taken == true).sum()} of {len(true)} right", fontsize=10)
    panels[1].set_yticklabels([])
    wrong = [
        f"{record['text']}\n     {names[true[row]]}, taken for {names[taken[row]]}"
        for row, record in enumerate(records_of(*query)) if taken[row] != true[row]
    ]  # fmt: skip
    more = [f"and {len(wrong) - MOST} more"] if len(wrong) > MOST else []
    shown = "\n".join(wrong[:MOST] + more) or "none"
    text.text(0, 1, shown, va="top", fontsize=8, parse_math=False, transform=text.transAxes)
    text.set_title("taken for another after adaptation", fontsize=10)
    text.set_axis_off()
    return figure


def draw_confusion(axes: Any, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Counts [ways, ways] as shades and numbers."""
    axes.imshow(confusion, cmap="Blues", vmin=0, vmax=confusion.sum(axis=1).max())
    for (row, column), count in np.ndenumerate(confusion):
        colour = "white" if count > confusion.sum(axis=1).max() / 2 else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)


if __name__ == "__main__":
    queries, domains, out = map(Path, sys.argv[1:])
    found = records(json.loads(queries.read_text()), json.loads(domains.read_text()))
    out.write_text("".join(json.dumps(record) + "\n" for record in found))
