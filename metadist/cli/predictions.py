"""What `metadist predict` does: adapts a run to labelled files, predicts others, prints or writes the predictions."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metadist.cli.tables import table
from metadist.core.errors import InputError, did_you_mean
from metadist.core.files import finite, reason, replace_text
from metadist.core.redaction import to_stderr

if TYPE_CHECKING:  # so that --help needs no torch
    from metadist.data.raw_files import RawExamples
    from metadist.run.few_shot import Adapted, FewShotLearner

TOGETHER, ALONE = 500, 50  # examples that are predicted at once: as one batch, and each with the support set
SETTINGS = ("inner_steps", "inner_lr", "transductive")
SUFFIXES = (".csv", ".jsonl")
WIDTH = 60
_SETTING = re.compile(r"([a-z_]+(?:\.[a-z_]+)+)=(.*)", re.DOTALL)

Rows = list[dict[str, Any]]
"""Predictions: of each example what it is called, what was predicted, and what is true, where that is known."""


def split_words(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Settings of evaluation, and what else is asked about. Raises InputError for other settings."""
    import yaml

    settings, others = {}, []
    for word in words:
        found = _SETTING.fullmatch(word)
        if not found:
            others.append(word)
            continue
        name = found[1].removeprefix("evaluation.")
        if name not in SETTINGS or name == found[1]:
            known = [f"evaluation.{each}" for each in SETTINGS]
            raise InputError(
                f"predict has no setting {found[1]}{did_you_mean(found[1], known)}; it has {', '.join(known)}"
            )
        try:
            settings[name] = yaml.safe_load(found[2])
        except yaml.YAMLError:
            raise InputError(f"{word} has a value that cannot be read; give a number, or true or false") from None
    return settings, others


def check_out(out: Path | None) -> None:
    """Raises InputError where predictions cannot be written there."""
    if out is not None and (out.suffix not in SUFFIXES or not out.parent.is_dir() or out.is_dir()):
        raise InputError(f"--out {out} must be a {' or '.join(SUFFIXES)} file in a folder that is there")


def learner_for(
    run: str,
    checkpoint: str,
    support: str | None,
    label: str | None,
    settings: dict[str, Any],
    trust_code: bool,
    skip_bad: bool = False,
) -> "Adapted":
    """The adapted learner: of a run and the labelled examples in `support`, or a saved one."""
    from metadist.run.predictor import load, load_adapted
    from metadist.run.saved import is_checkpoint

    if support is None:
        if not is_checkpoint(run):
            raise InputError(f"name labelled examples with --support: {run} is no folder of --save, adapted already")
        if settings:
            raise InputError(f"{run} has adapted already: leave evaluation.* out, or give --support")
        adapted = load_adapted(run, trust_code=trust_code)
        adapted.learner.inputs.say = _say
        return adapted
    learner = load(run, checkpoint, trust_code=trust_code, **settings)
    learner.inputs.say = _say
    examples = read(learner, [support], label, labelled=True, skip_bad=skip_bad)
    return learner.adapt(examples.x, examples.y)


def read(
    learner: "FewShotLearner", sources: Sequence[str], label: str | None, labelled: bool, skip_bad: bool = False
) -> "RawExamples":
    """The examples in files and folders; what is left out (with `skip_bad`, what cannot be used) is said."""
    from metadist.data.notes import Notes, sentence
    from metadist.data.raw_files import read_examples

    notes = Notes()
    examples = read_examples(sources, learner.inputs.about, label, labelled, notes, skip_bad)
    for note in notes.as_list():
        _say(sentence(note))
    return examples


def predictions(adapted: "Adapted", examples: "RawExamples") -> Rows:
    """A prediction for each example. Many are predicted in several batches, which is said."""
    transductive = adapted.learner.transductive and len(examples.names) > 1
    size, rows = TOGETHER if transductive else ALONE, []
    if transductive and len(examples.names) > size:
        _say(
            f"{len(examples.names)} examples are predicted in batches of {size}, the examples of each together; "
            "evaluation.transductive=false predicts each alone"
        )
    for start in range(0, len(examples.names), size):
        part = examples.part(start, size)
        if adapted.classes is None:
            rows += [{"value": value} for value in adapted.predict(part, transductive).tolist()]
            continue
        names = list(map(str, adapted.classes))
        for shares in adapted.predict_proba(part, transductive).tolist():
            best = int(np.argmax(shares))
            shared = dict(zip(names, shares, strict=True))
            rows.append({"label": names[best], "probability": shares[best], "probabilities": shared})
    truth = _truth(examples, len(rows))
    return [{"example": name, **row, **true} for name, row, true in zip(examples.names, rows, truth, strict=True)]


def _truth(examples: "RawExamples", count: int) -> Sequence[dict[str, Any]]:
    if examples.y is None:
        return [{}] * count
    if isinstance(examples.y, tuple):
        values = np.column_stack([each.reshape(len(each), -1) for each in examples.y])
        return [{"true": row} for row in values.tolist()]
    return [{"true": label} for label in examples.y]


def summary(rows: Rows, classes: np.ndarray | None) -> str:
    """How good the predictions are, where the truth is known; else nothing."""
    if "true" not in rows[0]:
        return ""
    if classes is None:
        errors = np.array([row["value"] for row in rows]) - np.array([row["true"] for row in rows])
        return f"root mean squared error  {np.sqrt(np.mean(errors**2)):.6g} over {len(rows)} rows, in the data's units"
    unknown = sorted({row["true"] for row in rows} - set(map(str, classes)))
    if unknown:
        _say(f"{', '.join(unknown[:5])}: no class of the support set, so that every prediction for it counts as wrong")
    right = sum(row["label"] == row["true"] for row in rows)
    return f"accuracy  {100 * right / len(rows):.1f} % ({right} of {len(rows)})"


def as_table(rows: Rows) -> str:
    """The predictions in columns, for people."""
    lines = [_shown(row) for row in rows]
    return table(lines, left=len(lines[0]))


def _shown(row: dict[str, Any]) -> dict[str, str]:
    from metadist.data.notes import shown

    example = shown(row["example"])
    found = {"example": example if len(example) <= WIDTH else f"{example[: WIDTH - 3]}..."}
    if "label" in row:
        found |= {"label": shown(row["label"]), "probability": f"{row['probability']:.3f}"}
        return found | ({"true": shown(row["true"])} if "true" in row else {})
    return found | {name: ", ".join(f"{v:.6g}" for v in row[name]) for name in ("value", "true") if name in row}


def as_json_lines(rows: Rows) -> str:
    """A JSON object a line: example, label, probability, probabilities of all classes, true; or value and true."""
    return "\n".join(json.dumps(finite(row), ensure_ascii=False) for row in rows)


def as_csv(rows: Rows) -> str:
    """As CSV, with a column p_NAME for the probability of each class, or value_1, value_2, ..."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, line in enumerate(map(dict, map(_cells, rows))):
        if number == 0:
            writer.writerow(line)
        writer.writerow(line.values())
    return text.getvalue()


def _cells(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"p_{key}", share) for key, share in value.items())
        elif isinstance(value, list):
            yield from ((f"{name}_{place}", each) for place, each in enumerate(value, 1))
        else:
            yield name, value


def write(rows: Rows, out: Path) -> None:
    """Predictions to a .csv or .jsonl file. Raises InputError where it cannot be written."""
    try:
        replace_text(out, as_csv(rows) if out.suffix == ".csv" else as_json_lines(rows) + "\n")
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({reason(error)}); choose another") from None


def _say(text: str) -> None:
    to_stderr(f"note: {text}")
