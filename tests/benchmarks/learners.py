"""Every learner on Omniglot and on the sinusoid, by one equal budget: `python tests/benchmarks/learners.py DATASET`.

DATASET is what `metadist data omniglot` made. Each of `jobs/learners/` runs in a process of its own, on one thread, as
many at a time as there are cores: accuracy on tasks of new characters with its 95 % interval, tasks per second of
training, peak resident memory. The budget is short: the order of the best is not that of the papers. Prints tables.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "jobs" / "learners"
COMMON = [
    "num_workers=1", "fleet.backend=local", "tracking.mlflow=false", "evaluation.every=0", "evaluation.test_tasks=600",
    "checkpoint.every=100000",
]  # fmt: skip
TWENTY_WAYS = ["task.ways=20", "meta_batch_size=8", "evaluation.queries=5", "evaluation.test_tasks=200"]
OF_TWENTY_WAYS: dict[str, list[str]] = {
    "cavia": ["learner.inner_lr=100", "learner.inner_steps=5", "meta_lr=0.003"],
    "maml_plus_plus": [
        "learner.inner_lr=0.4", "meta_lr=0.003", "learner.multi_step_until=60", "learner.first_order_until=15",
    ],
}  # fmt: skip
"""Learners whose settings of 5 ways learn 20 ways slowly, or not at all, and what does better by validation."""
SINUSOID = [
    "data.path=null", "data.family=sinusoid", "task.shots=10", "task.queries=10", "model.name=mlp",
    "model.hidden=[40,40]", "meta_batch_size=25", "evaluation.shots=5", "evaluation.queries=null",
]  # fmt: skip
REGRESSION: dict[str, list[str]] = {
    "maml": ["learner.inner_lr=0.01"],
    "fomaml": ["learner.inner_lr=0.01"],
    "anil": ["learner.inner_lr=0.01", "learner.inner_steps=1"],
    "boil": ["learner.inner_lr=0.01"],
    "meta_sgd": ["learner.lowest_rate=0.005", "learner.highest_rate=0.02"],
    "maml_plus_plus": ["learner.inner_lr=0.01"],
    "task_adaptive": ["learner.inner_lr=0.01"],
    "reptile": ["meta_lr=1.0", "learner.inner_lr=0.01", "learner.inner_optimizer=sgd", "learner.inner_batch=0"],
    "platipus": ["learner.inner_lr=0.01", "learner.predicts=values"],
    "meta_curvature": ["learner.inner_lr=0.01"],
    "cavia": ["learner.inner_lr=1.0", "learner.inner_steps=1", "model.context=5"],
    "r2d2": ["learner.initial_scale=1.0"],
}
"""The learners that apply to regression, and their own settings for it. Not iMAML: its linear system needs a positive
definite I + H / lambda, which this network's squared error does not give at a lambda that lets it adapt."""


@dataclass(frozen=True)
class Run:
    """One learner on one problem."""

    learner: str
    problem: str
    overrides: tuple[str, ...]


def compute(run: Run, folder: Path, verbose: bool) -> dict[str, Any]:
    """What the run's results say, its speed, and its peak memory in MB; `failed` where it did not end well."""
    run_dir = folder / f"{run.problem}-{run.learner}".replace(" ", "_")
    command = [sys.executable, "-m", "metadist", "train", str(JOBS / f"{run.learner}.yaml"), f"run_dir={run_dir}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / f"{run_dir.name}.log").open("w") as log:
        process = subprocess.Popen([*command, *run.overrides], stdout=log, stderr=log, env=environment)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return {"failed": (folder / f"{run_dir.name}.log").read_text().strip().splitlines()[-1]}
    results = json.loads((run_dir / "results.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["workers/tasks_per_s"] for line in lines if "workers/tasks_per_s" in line]
    if verbose:
        print(f"{run.problem} {run.learner}: done", file=sys.stderr)
    return {"results": results, "tasks_per_s": median(rates), "memory_mb": used.ru_maxrss / 1024}


def cell(interval: dict[str, float], scale: float, digits: int) -> str:
    if interval["mean"] is None or interval["ci95"] is None:
        return "not finite"
    return f"{scale * interval['mean']:.{digits}f} ± {scale * interval['ci95']:.{digits}f}"


def table(found: dict[str, dict[str, Any]], metric: str) -> str:
    """Learners, then the baselines of the first of them that has any."""
    scale, digits = (100.0, 1) if metric == "accuracy" else (1.0, 3)
    unit = "accuracy, %" if metric == "accuracy" else "mean squared error"
    lines = [f"| learner | before adaptation | {unit} | tasks/s | peak memory, MB |", "|---|---|---|---|---|"]
    baselines: dict[str, str] = {}
    for name, told in found.items():
        if "failed" in told:
            lines.append(f"| {name} | failed: {told['failed']} | | | |")
            continue
        own = told["results"]["evaluation"] if "evaluation" in told["results"] else told["results"]
        before, after = (cell(own[metric][when], scale, digits) for when in ("before", "after"))
        lines.append(f"| {name} | {before} | {after} | {told['tasks_per_s']:.0f} | {told['memory_mb']:.0f} |")
        for baseline, measured in own["baselines"].items():
            value = measured[metric]
            last = value[-1] if isinstance(value, list) else value
            baselines.setdefault(baseline.replace("_", " "), f"{cell(last, scale, digits)} ({measured['tasks']} tasks)")
    lines += [f"| *{name}* | | {value} | | |" for name, value in baselines.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(path.stem for path in JOBS.glob("*.yaml")))
    parser.add_argument("--problems", nargs="+", default=["5 ways", "20 ways", "sinusoid"])
    parser.add_argument("--meta-steps", nargs=3, type=int, default=[400, 150, 2000], help="of the three problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="in every run")
    args = parser.parse_args()
    names = args.only or sorted(path.stem for path in JOBS.glob("*.yaml"))
    steps = dict(zip(["5 ways", "20 ways", "sinusoid"], args.meta_steps, strict=True))
    runs = []
    for problem in args.problems:
        shared = [*COMMON, f"seed={args.seed}", f"meta_steps={steps[problem]}"]
        for name in names:
            if problem == "sinusoid" and name in REGRESSION:
                runs.append(Run(name, problem, (*shared, *SINUSOID, *REGRESSION[name], *args.set)))
            elif problem != "sinusoid":
                own = [f"data.path={args.dataset.resolve()}"]
                own += [*TWENTY_WAYS, *OF_TWENTY_WAYS.get(name, [])] if problem == "20 ways" else []
                baselines = ["evaluation.baselines=[]"]
                if name == "maml":  # once for all
                    baselines = ["evaluation.baselines=[nearest_class_mean,from_scratch,joint]"]
                runs.append(Run(name, problem, (*shared, *own, *baselines, *args.set)))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        found = list(pool.map(lambda run: compute(run, Path(folder), verbose=True), runs))
    print(f"{' '.join(['python', 'tests/benchmarks/learners.py', *sys.argv[1:]])}")
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, torch {version('torch')}, {args.at_once} runs at once")
    for problem in args.problems:
        own = {run.learner: told for run, told in zip(runs, found, strict=True) if run.problem == problem}
        print(f"\n{problem}, {steps[problem]} meta-steps, seed {args.seed}\n")
        print(table(own, "loss" if problem == "sinusoid" else "accuracy"))


if __name__ == "__main__":
    main()
