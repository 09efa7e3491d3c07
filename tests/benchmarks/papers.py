"""The papers' Omniglot tables, cell by cell: `python tests/benchmarks/papers.py --source FOLDER_OF_THE_ZIPS --out DIR`.

Each cell is a learner at 5 or 20 ways and 1 or 5 shots, tested as its paper tested it. What is trained is shorter than
there: each row says how many of the paper's tasks it saw, and in what else its training differs. Weights are the best
by validation alone; the test split is looked at once, at the end.

A run that was killed goes on where it was when the same command is given again; one that its budget of time cut off
goes on for another budget. `--report` prints the table of what is there, unfinished cells included and marked. To leave
it alone: `nohup nice -n 10 python tests/benchmarks/papers.py ... > DIR.log 2>&1 &`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "jobs" / "learners"
COMMON = (
    "num_workers=1", "fleet.backend=local", "tracking.mlflow=false", "tracking.log_every=50", "evaluation.baselines=[]",
    "evaluation.test_tasks=20", "checkpoint.every=1000000", "checkpoint.every_s=120",
)  # fmt: skip
"""Of every training. Its own final evaluation, of 20 tasks, is not used: the cells have theirs."""
COSINE = "optimizer.schedule=cosine"
COMPILED = "engine.compile=true"
"""Twice as fast with few images a task; refused where rounding moves one task's gradient by a hundredth, as it does at
5 shots and at 60 ways, probably as units lie at the kink of the ReLU."""


@dataclass(frozen=True)
class Paper:
    """Where figures were published, and how they were measured."""

    source: str
    protocol: str
    test_tasks: int
    transductive: bool
    rotated_test: bool
    """Whether the test split too has each character at four angles. Training has in all of these papers."""


FINN = Paper(
    "Finn et al. 2017, table 1 (arXiv 1703.03400)",
    "1,100 characters to train on, 100 to validate, 423 to test, each at four angles (here a task may hold one "
    "character at two of these, there it cannot); as many queries a class as shots; 3 inner steps at 5 ways, 5 at 20",
    600, True, True,
)  # fmt: skip
NICHOL_FO = Paper("Nichol et al. 2018, table 2 (arXiv 1803.02999)", "that of MAML", 600, True, True)
NICHOL = Paper(
    "Nichol et al. 2018, table 2 (arXiv 1803.02999)",
    "1,200 characters to train on at four angles, 423 to test at one; one query a class, 50 inner steps (batches of 5 "
    "images at 5 ways, of 10 at 20)",
    10_000, True, False,
)  # fmt: skip
SNELL = Paper(
    "Snell et al. 2017, table 1 (arXiv 1703.05175), Euclidean, trained with 60 ways (not checked against the paper)",
    "1,200 characters to train and validate on, 423 to test, each at four angles; 15 queries a class, each by itself",
    1000, False, True,
)  # fmt: skip
BERTINETTO = Paper(
    "Bertinetto et al. 2019, table 2 (arXiv 1805.08136), network of 64 channels (not checked against the paper)",
    "split and angles of Snell et al.; queries each by themselves",
    10_000, False, True,
)  # fmt: skip
ANTONIOU = Paper(
    "Antoniou et al. 2019, table 1 (arXiv 1810.09502)",
    "1,150 / 50 / 423 characters, each at four angles; one query a class, 5 inner steps; an ensemble of the 5 best "
    "epochs",
    600, True, True,
)  # fmt: skip
RAGHU = Paper("Raghu et al. 2020, table 1 (arXiv 1909.09157)", "that of MAML", 600, True, True)


@dataclass(frozen=True)
class Training:
    """One meta-training, of which one or more cells are measured.

    learner: its job of `jobs/learners/`. settings: what changes in that. paper_tasks: how many tasks the paper's run
    sees, None where it is not known. differs: in what the training is another than the paper's, beside its length.
    """

    name: str
    learner: str
    meta_steps: int
    settings: tuple[str, ...]
    paper_tasks: int | None
    differs: str


@dataclass(frozen=True)
class Cell:
    """One figure of a paper, and how it is measured here.

    published: as it stands there, in percent, "" where the paper has none. goal: percent that ours is to reach.
    settings: of `metadist evaluate`. also: of a second evaluation, by another protocol, named by its first word.
    """

    learner: str
    ways: int
    shots: int
    training: str
    paper: Paper
    published: str
    settings: tuple[str, ...]
    goal: float | None = None
    also: tuple[str, ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.learner}-{self.ways}w{self.shots}s"


def maml_like(
    learner: str, ways: int, shots: int, meta_steps: int, settings: tuple[str, ...], tasks: int | None, differs: str
) -> Training:
    """Training as it is tested, with one query a class for each shot; validated so too."""
    inner = {5: 3, 20: 5}[ways] if learner in ("maml", "fomaml") else 5
    shared = (
        f"task.ways={ways}", f"task.shots={shots}", f"evaluation.queries={shots}", f"evaluation.inner_steps={inner}",
        f"evaluation.tasks={600 if ways * shots < 25 else 300}", f"evaluation.every={max(1, meta_steps // 10)}",
        COSINE,
    )  # fmt: skip
    return Training(f"{learner}-{ways}w{shots}s", learner, meta_steps, (*shared, *settings), tasks, differs)


def by_features(
    learner: str, shots: int, ways: int, meta_steps: int, settings: tuple[str, ...], differs: str
) -> Training:
    """Training of a learner whose head is made from the support set: on many ways, for tests of any number of them. The
    last of two settings of one key counts."""
    shared = (
        "task.ways=60", f"task.shots={shots}", "task.queries=5", "meta_batch_size=1", COSINE,
        f"evaluation.ways={ways}", "evaluation.queries=5", "evaluation.tasks=200",
        f"evaluation.every={max(1, meta_steps // 10)}",
    )  # fmt: skip
    return Training(f"{learner}-{shots}s", learner, meta_steps, (*shared, *settings), None, differs)


ONE_STEP = (
    "one inner step at rate {rate} of the mean loss (2.0 there), {queries} queries a class, batches of {batch}, Adam "
    "at {meta_lr} along a cosine (0.001 throughout there); scale and shift of normalisation are adapted too"
)
FEWER = "cosine in place of halving the rate; a strided network (pooled there); validated with queries as one batch"


def maml_settings(rate: float, queries: int, batch: int, meta_lr: float, inner_steps: int = 1) -> tuple[str, ...]:
    return (
        f"learner.inner_lr={rate}", f"learner.inner_steps={inner_steps}", f"task.queries={queries}",
        f"meta_batch_size={batch}", f"meta_lr={meta_lr}",
    )  # fmt: skip


def said(rate: float, queries: int, batch: int, meta_lr: float) -> str:
    return ONE_STEP.format(rate=rate, queries=queries, batch=batch, meta_lr=meta_lr)


FIVE_ONE, FIVE_FIVE = (0.4, 3, 16, 0.002), (0.4, 3, 8, 0.002)
TWENTY_ONE, TWENTY_FIVE = (0.5, 2, 8, 0.002), (0.5, 2, 4, 0.002)
R2D2 = ("task.ways=20", "meta_batch_size=3", "meta_lr=0.002", "learner.initial_lambda=1.0",
        "learner.initial_scale=10.0")  # fmt: skip
R2D2_FEWER = f"20 ways: with 60 the statistics of a batch are further from a test's; lambda is learned; {FEWER}"
REPTILE = ("task.shots=10", "task.queries=1", "meta_batch_size=5", "evaluation.shots=1", "evaluation.queries=1",
           "evaluation.inner_steps=50", "evaluation.tasks=200")  # fmt: skip
PLUS = "3 inner steps (5 there), losses of all steps and first order for the first tenths, batches of 8, one checkpoint"

TRAININGS = [
    maml_like("maml", 5, 1, 11000, (*maml_settings(*FIVE_ONE), COMPILED), 60_000 * 32, said(*FIVE_ONE)),
    by_features("protonet", 1, 20, 9000, ("meta_lr=0.001",), FEWER),
    by_features("r2d2", 1, 5, 18000, R2D2,
                f"1 shot (1 to 9 there, at random); {R2D2_FEWER}"),
    maml_like("maml", 5, 5, 40000, maml_settings(*FIVE_FIVE), 60_000 * 32, said(*FIVE_FIVE)),
    maml_like("maml", 20, 1, 6000, maml_settings(*TWENTY_ONE), 60_000 * 16, said(*TWENTY_ONE)),
    maml_like("anil", 5, 1, 6000, (*maml_settings(0.4, 3, 16, 0.002, 3), "evaluation.inner_steps=3"), None,
              "3 inner steps, batches of 16, cosine"),
    maml_like("anil", 20, 1, 4000, maml_settings(0.4, 2, 8, 0.002, 3), None, "3 inner steps (5 there), cosine"),
    maml_like("fomaml", 5, 1, 8000, maml_settings(*FIVE_ONE), 60_000 * 32, said(*FIVE_ONE)),
    maml_like("fomaml", 20, 1, 4000, maml_settings(*TWENTY_ONE), 60_000 * 16, said(*TWENTY_ONE)),
    Training("reptile-5w", "reptile", 6000, (*REPTILE, "task.ways=5", "evaluation.every=1000"), 100_000 * 5,
             "Adam's second moment begins at zero in each task"),
    maml_like("maml_plus_plus", 5, 1, 2500, (*maml_settings(0.2, 1, 8, 0.001, 3), "learner.multi_step_until=1000",
              "learner.first_order_until=250", "optimizer.final_lr=0.00001"), 50_000 * 8, PLUS),
    maml_like("maml_plus_plus", 20, 1, 1500, (*maml_settings(0.2, 1, 8, 0.001, 3), "learner.multi_step_until=600",
              "learner.first_order_until=150", "optimizer.final_lr=0.00001"), 50_000 * 8, PLUS),
    by_features("protonet", 5, 20, 4000, ("meta_lr=0.001",), FEWER),
    by_features("r2d2", 5, 5, 4000, R2D2,
                f"5 shots (1 to 9 there, at random); {R2D2_FEWER}"),
    Training("reptile-20w", "reptile", 2000, (*REPTILE, "task.ways=20", "learner.inner_steps=10",
             "learner.inner_batch=20", "learner.inner_lr=0.0005", "evaluation.tasks=50", "evaluation.every=500"),
             200_000 * 5, "Adam's second moment begins at zero in each task; tested with batches of 20 (10 there)"),
    maml_like("maml", 20, 5, 1500, maml_settings(*TWENTY_FIVE), 60_000 * 16, said(*TWENTY_FIVE)),
    maml_like("anil", 5, 5, 3000, (*maml_settings(0.4, 5, 8, 0.002, 3), "evaluation.inner_steps=3"), None,
              "3 inner steps, batches of 8, cosine"),
    maml_like("anil", 20, 5, 1500, maml_settings(0.4, 2, 4, 0.002, 3), None, "3 inner steps (5 there), cosine"),
    maml_like("fomaml", 5, 5, 5000, maml_settings(*FIVE_FIVE), 60_000 * 32, said(*FIVE_FIVE)),
    maml_like("fomaml", 20, 5, 1500, maml_settings(*TWENTY_FIVE), 60_000 * 16, said(*TWENTY_FIVE)),
    maml_like("maml_plus_plus", 5, 5, 1500, (*maml_settings(0.2, 1, 8, 0.001, 3), "learner.multi_step_until=600",
              "learner.first_order_until=150", "optimizer.final_lr=0.00001"), 50_000 * 8, PLUS),
    maml_like("maml_plus_plus", 20, 5, 800, (*maml_settings(0.2, 1, 4, 0.001, 3), "learner.multi_step_until=320",
              "learner.first_order_until=80", "optimizer.final_lr=0.00001"), 50_000 * 8, PLUS),
]  # fmt: skip


def tested(tasks: int, queries: int, steps: int | None = None, *more: str) -> tuple[str, ...]:
    inner = () if steps is None else (f"evaluation.inner_steps={steps}",)
    return (f"evaluation.test_tasks={tasks}", f"evaluation.queries={queries}", *inner, *more)


ALONE, TOGETHER = "evaluation.transductive=false", "evaluation.transductive=true"


def by_features_cell(
    learner: str, ways: int, shots: int, paper: Paper, published: str, tasks: int, **more: Any
) -> Cell:
    """Queries by themselves take a pass of the network each, with the support set: so few of them at 20 ways."""
    queries = {(5, 1): 15, (5, 5): 15, (20, 1): 2, (20, 5): 1}[ways, shots]
    one = (f"evaluation.ways={ways}", f"evaluation.shots={shots}")
    also = (*tested(600, 15 if ways == 5 else 5), *one, TOGETHER)
    note = f"queries a class: {queries}, which changes the interval alone" if ways == 20 else ""
    settings = (*tested(tasks, queries), *one, ALONE)
    return Cell(learner, ways, shots, f"{learner}-{shots}s", paper, published, settings, also=also, note=note, **more)


def own(
    learner: str, ways: int, shots: int, paper: Paper, published: str, settings: tuple[str, ...], **more: Any
) -> Cell:
    return Cell(learner, ways, shots, f"{learner}-{ways}w{shots}s", paper, published, settings, **more)


def reptile(ways: int, shots: int, published: str, tasks: int) -> Cell:
    settings = tested(tasks, 1, 50, f"evaluation.shots={shots}", TOGETHER)
    return Cell("reptile", ways, shots, f"reptile-{ways}w", NICHOL, published, settings)


NO_FIGURE = "the paper has no figure for this"
CELLS = [
    own("maml", 5, 1, FINN, "98.7 ± 0.4", tested(600, 1, 3), goal=98.2),
    by_features_cell("protonet", 20, 1, SNELL, "96.0", 1000, goal=95.0),
    by_features_cell("r2d2", 5, 1, BERTINETTO, "98.55 ± 0.05", 2000, goal=98.4),
    own("maml", 5, 5, FINN, "99.9 ± 0.1", tested(600, 5, 3), goal=99.4),
    own("maml", 20, 1, FINN, "95.8 ± 0.3", tested(600, 1, 5), goal=92.0),
    by_features_cell("protonet", 5, 1, SNELL, "98.8", 1000),
    by_features_cell("r2d2", 20, 1, BERTINETTO, "94.70 ± 0.05", 1000),
    own("anil", 5, 1, RAGHU, "", tested(600, 1, 3), note=NO_FIGURE),
    own("anil", 20, 1, RAGHU, "96.2 ± 0.5", tested(600, 1, 5)),
    own("fomaml", 5, 1, NICHOL_FO, "98.3 ± 0.5", tested(600, 1, 3)),
    own("fomaml", 20, 1, NICHOL_FO, "89.4 ± 0.5", tested(600, 1, 5)),
    reptile(5, 1, "97.68 ± 0.04", 2000),
    reptile(5, 5, "99.48 ± 0.06", 1000),
    own("maml_plus_plus", 5, 1, ANTONIOU, "99.47", tested(600, 1, 5)),
    own("maml_plus_plus", 20, 1, ANTONIOU, "97.65 ± 0.05", tested(600, 1, 5)),
    by_features_cell("protonet", 5, 5, SNELL, "99.7", 1000),
    by_features_cell("protonet", 20, 5, SNELL, "98.9", 200),
    by_features_cell("r2d2", 5, 5, BERTINETTO, "99.66 ± 0.02", 1000),
    by_features_cell("r2d2", 20, 5, BERTINETTO, "98.91 ± 0.02", 200),
    reptile(20, 1, "89.43 ± 0.14", 500),
    reptile(20, 5, "97.12 ± 0.32", 300),
    own("maml", 20, 5, FINN, "98.9 ± 0.2", tested(600, 5, 5)),
    own("anil", 5, 5, RAGHU, "", tested(600, 5, 3), note=NO_FIGURE),
    own("anil", 20, 5, RAGHU, "98.0 ± 0.3", tested(600, 5, 5)),
    own("fomaml", 5, 5, NICHOL_FO, "99.2 ± 0.2", tested(600, 5, 3)),
    own("fomaml", 20, 5, NICHOL_FO, "97.9 ± 0.1", tested(600, 5, 5)),
    own("maml_plus_plus", 5, 5, ANTONIOU, "99.93", tested(600, 1, 5)),
    own("maml_plus_plus", 20, 5, ANTONIOU, "99.33 ± 0.03", tested(600, 1, 5)),
]
"""In the order they are computed: those with a goal first."""


class Stopped(Exception):
    """A signal ended this script."""


@dataclass
class Bench:
    """Runs commands below a folder, and knows what each took. A signal to this process goes on to them, so that runs
    save what they have."""

    out: Path
    data: Path
    stopping: threading.Event = field(default_factory=threading.Event)
    running: set[int] = field(default_factory=set)

    def stop(self, number: int, frame: Any) -> None:
        del number, frame
        self.stopping.set()
        for pid in list(self.running):
            os.kill(pid, signal.SIGTERM)

    def call(self, name: str, *arguments: str) -> tuple[int, str]:
        """Exit status and standard output of a `metadist` command; what it says goes to logs/NAME.log, and what it took
        to times/NAME.jsonl."""
        for folder in ("logs", "times"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        began, environment = time.monotonic(), os.environ | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        answer = self.out / "logs" / f"{name}.{arguments[0]}.out"
        with (self.out / "logs" / f"{name}.log").open("a") as log, answer.open("w") as printed:
            print(f"{datetime.now(UTC):%F %T} metadist {' '.join(arguments)}", file=log, flush=True)
            if self.stopping.is_set():
                raise Stopped
            process = subprocess.Popen(
                [sys.executable, "-m", "metadist", *arguments], stdout=printed, stderr=log, env=environment
            )
            self.running.add(process.pid)
            _, status, used = os.wait4(process.pid, 0)
            self.running.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        took = {"command": arguments[0], "wall_s": round(time.monotonic() - began, 1)}
        took |= {"processor_s": round(used.ru_utime + used.ru_stime, 1)}
        with (self.out / "times" / f"{name}.jsonl").open("a") as times:
            print(json.dumps(took), file=times)
        if self.stopping.is_set():
            raise Stopped
        return process.returncode, answer.read_text()

    def taken(self, name: str) -> tuple[float, float]:
        """Seconds of wall and of processor time of a training, in all its parts that ended."""
        file = self.out / "times" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        rows = [row for row in rows if row["command"] == "train"]
        return sum(row["wall_s"] for row in rows), sum(row["processor_s"] for row in rows)


def say(text: str) -> None:
    print(f"{datetime.now(UTC):%F %T} {text}", flush=True)


def dataset(bench: Bench, source: Path | None, rotations: str) -> Path:
    """Omniglot by the papers' division, 1,100 / 100 / 423 characters at random, imported where it is not there yet."""
    out = bench.data / f"rotations_{rotations}"
    if not out.exists():
        if source is None:
            raise SystemExit("give --source, the folder with Omniglot's two zips")
        arguments = ("omniglot", "--source", str(source), "--rotations", rotations, "--out", str(out))
        status, _ = bench.call(f"data_{rotations}", "data", *arguments)
        if status:
            raise SystemExit(f"the import failed, see {bench.out}/logs/data_{rotations}.log")
    return out


def trained(bench: Bench, training: Training, seed: int) -> dict[str, Any] | None:
    """What the training's results.json says, None before it has any."""
    file = bench.out / "runs" / f"{training.name}-seed{seed}" / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


def train(bench: Bench, training: Training, seed: int, data: Path, args: argparse.Namespace) -> bool:
    """Begin it, or go on with it, until it is done or its budget is over; whether it can be evaluated."""
    before, name = trained(bench, training, seed), f"{training.name}-seed{seed}"
    if before and before.get("ended_by") == "done" and before["meta_steps"] >= training.meta_steps:
        return True
    say(f"{name}: training, {training.meta_steps} meta-steps")
    status, _ = bench.call(
        name, "train", str(JOBS / f"{training.learner}.yaml"), f"run_dir={bench.out / 'runs' / name}",
        f"data.path={data}", f"seed={seed}", f"meta_steps={training.meta_steps}", *COMMON, *training.settings,
        f"max_time_s={args.budget_s}", *args.set, "--resume", "auto", "--json",
    )  # fmt: skip
    if status:
        say(f"{name}: failed with status {status}, see {bench.out}/logs/{name}.log")
        return False
    after = trained(bench, training, seed) or {}
    wall_s, processor_s = bench.taken(name)
    say(f"{name}: at step {after.get('meta_steps')} ({after.get('ended_by')}), {processor_s:.0f} s of processor time")
    return True


def test(bench: Bench, cell: Cell, training: Training, seed: int, data: Path) -> None:
    """Evaluate the training's best weights by the paper's protocol, unless that has been done for these."""
    results, file = trained(bench, training, seed) or {}, bench.out / "cells" / f"{cell.name}-seed{seed}.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    if done.get("trained_steps") == results["meta_steps"] and done.get("settings") == list(cell.settings):
        return
    run, found = bench.out / "runs" / f"{training.name}-seed{seed}", {}
    for kind, settings in (("own", cell.settings), ("also", cell.also)):
        if settings:
            status, printed = bench.call(
                f"{cell.name}-seed{seed}",
                "evaluate",
                str(run),
                f"data.path={data}",
                "engine.compile=false",
                *settings,
                "--json",
            )
            if status:
                say(f"{cell.name}: its evaluation failed, see {bench.out}/logs/{cell.name}-seed{seed}.log")
                return
            answer = json.loads(printed)
            found[kind] = {"protocol": answer["protocol"], **answer["accuracy"]["after"]}
            found |= {"evaluated_step": answer["evaluated_step"]}
    row = {"trained_steps": results["meta_steps"], "ended_by": results["ended_by"], "settings": list(cell.settings)}
    row |= {"tasks_a_step": results["resolved"]["meta_batch_size"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(row | found, indent=2))
    draft.replace(file)
    say(f"{cell.name} seed {seed}: {percent(found['own'])} %, published {cell.published or 'nothing'}")


def percent(interval: dict[str, Any]) -> str:
    if interval["mean"] is None:
        return "diverged"
    return f"{100 * interval['mean']:.2f} ± {100 * interval['ci95']:.2f}"


def last_validation(run: Path) -> str:
    """Where a training is that no cell has been measured of."""
    file = run / "metrics.jsonl"
    if not file.exists():
        return ""
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a run that is writing it
            break
    accuracies = [row["validation/accuracy"] for row in rows if row.get("validation/accuracy") is not None]
    step = max((row.get("step", 0) for row in rows), default=0)
    return f"training, step {step}" + (f", validation {100 * max(accuracies):.1f}" if accuracies else "")


def report(bench: Bench, cells: list[Cell], seeds: list[int]) -> str:
    lines = [
        "| learner | ways, shots | published | ours, by the paper's protocol | queries as one batch | test tasks | "
        "training tasks, of the paper's | processor, wall time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        training = next(each for each in TRAININGS if each.name == cell.training)
        row = row_of(bench, cell, training, seeds)
        if row:
            lines.append(row)
    papers = {cell.learner: cell.paper for cell in cells}
    lines.append("")
    lines += [
        f"- {name}: {paper.source}. {paper.protocol}; {paper.test_tasks:,} test tasks."
        for name, paper in papers.items()
    ]
    used = {cell.training for cell in cells}
    lines += [f"- `{each.name}`: {each.differs}." for each in TRAININGS if each.name in used]
    return "\n".join(lines)


def row_of(bench: Bench, cell: Cell, training: Training, seeds: list[int]) -> str:
    """The cell's line, "" where nothing has begun."""
    figures, also, seen, tests, times, means = [], [], [], set[int](), [], []
    for seed in seeds:
        name = f"{training.name}-seed{seed}"
        file = bench.out / "cells" / f"{cell.name}-seed{seed}.json"
        if not file.exists():
            if begun := last_validation(bench.out / "runs" / name):
                figures.append(f"({begun})")
            continue
        found = json.loads(file.read_text())
        partial = "" if found["ended_by"] == "done" else f" (cut off at step {found['trained_steps']})"
        figures.append(f"{percent(found['own'])}{partial}")
        means.append(found["own"]["mean"])
        also += [percent(found["also"])] if "also" in found else []
        seen.append(found["trained_steps"] * found["tasks_a_step"])
        tests.add(found["own"]["protocol"]["tasks"])
        wall_s, processor_s = bench.taken(name)
        times.append(f"{processor_s / 60:.1f}, {wall_s / 60:.1f} min")
    if not figures:
        return ""
    if len(means) > 1 and None not in means:
        spread = 100 * (max(means) - min(means))
        figures.append(f"mean {100 * mean(means):.2f}, seeds apart by {spread:.2f}")
    of = f" of {training.paper_tasks:,}" if training.paper_tasks else ", of how many is not stated"
    tasks = ", ".join(f"{count:,}" for count in seen) + of if seen else ""
    goal = f" (goal {cell.goal})" if cell.goal else ""
    note = f"; {cell.note}" if cell.note else ""
    count = (
        ", ".join(f"{number:,}" for number in sorted(tests)) + f" of {cell.paper.test_tasks:,}{note}" if tests else ""
    )
    own_protocol = "the same" if cell.paper.transductive else ", ".join(also)
    return (
        f"| {cell.learner.replace('_plus_plus', '++')} | {cell.ways}, {cell.shots} | {cell.published or '-'}{goal} | "
        f"{'; '.join(figures)} | {own_protocol} | {count} | {tasks} | {'; '.join(times)} |"
    )


def work(bench: Bench, cells: list[Cell], args: argparse.Namespace) -> None:
    """Train what the cells need, in their order, `--at-once` at a time, and measure each cell once its training is
    there."""
    data = {kind: dataset(bench, args.source, kind) for kind in ("all", "train")}
    names = list(dict.fromkeys(cell.training for cell in cells))
    order = [next(each for each in TRAININGS if each.name == name) for name in names]

    def one(job: tuple[Training, int]) -> None:
        training, seed = job
        mine = [cell for cell in cells if cell.training == training.name]
        place = data["all" if mine[0].paper.rotated_test else "train"]
        if train(bench, training, seed, place, args):
            for cell in mine:
                test(bench, cell, training, seed, place)

    stopped = False
    with ThreadPoolExecutor(args.at_once) as pool:
        jobs = [pool.submit(one, (training, seed)) for seed in args.seeds for training in order]
        for job in jobs:
            try:
                job.result()
            except Stopped:
                stopped = True
    if stopped:
        say("stopped; the same command goes on from here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder with Omniglot's two zips, for the first call")
    parser.add_argument("--out", type=Path, required=True, help="runs, logs and results")
    parser.add_argument("--data", type=Path, help="where Omniglot is imported to, default OUT/data")
    parser.add_argument("--only", nargs="+", metavar="CELL", help=f"of {', '.join(cell.name for cell in CELLS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--budget-s", type=float, default=3600.0, help="of one training in one call, wall time")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="trainings, of one thread each")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="in every training, for a trial")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, and end")
    args = parser.parse_args()
    args.out = args.out.resolve()
    cells, bench = CELLS, Bench(args.out, (args.data or args.out / "data").resolve())
    if args.only:
        if unknown := set(args.only) - {cell.name for cell in CELLS}:
            parser.error(f"no cells: {', '.join(sorted(unknown))}")
        cells = [cell for cell in CELLS if cell.name in args.only]
    if not args.report:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, bench.stop)
        work(bench, cells, args)
    print(report(bench, cells, args.seeds))


if __name__ == "__main__":
    main()
