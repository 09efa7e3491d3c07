"""What peers.py prints: tables of medians over rounds, and what could not run or did not agree."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

TOLERANCE = 1e-3
JAX = "JAX"
Runs = list[dict[str, Any]]


def machine() -> str:
    """CPU model and how many cores there are to use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def heading(results: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    print(
        f"# metadist and its peers\n\n{results['machine']}. Python {results['python']}, {versions}. {results['date']}."
    )
    print(f"\n    {results['command']}", flush=True)


def brief(run: dict[str, Any]) -> str:
    """One run in one line."""
    what = run.get("error") or f"{run['tasks_per_s']:.4g} tasks/s"
    return f"{run['name']}, {threads(run)}: {what}"


def threads(run: dict[str, Any]) -> str:
    return f"{run['processes']} x {run['threads']} thread{'s' * (run['threads'] > 1)}"


def speeds(part: dict[str, Any]) -> None:
    """Tasks a second of one workload, and metadist's as a multiple of the fastest peer's of the same round."""
    print(f"\n## {part['workload']['name']}\n\n{part['description']}.\n")
    wrong = outliers(part["runs"])
    good = [run for run in part["runs"] if "error" not in run and run["name"] not in wrong]
    chosen = best_settings(good)
    peers = fastest_peer(chosen)
    rows = []
    for name, runs in chosen.items():
        rates = [run["tasks_per_s"] for run in runs]
        ratios = [run["tasks_per_s"] / peers[run["round"]] for run in runs if run["round"] in peers]
        first, peak = (median(run[key] for run in runs) for key in ("first_step_s", "peak_mb"))
        ratio = f"{median(ratios):.2f} ({spread(ratios)})" if ratios else "no peer"
        rows.append([name, release(runs[0]), threads(runs[0]), f"{median(rates):.4g} ({spread(rates)})", ratio,
                     f"{first:.1f}", f"{peak:.0f}"])  # fmt: skip
    table(["", "version", "processes", "tasks/s, median (min-max)", "of the fastest peer", "first step, s",
           "memory over baseline, MB"], rows)  # fmt: skip
    for sentence in comparisons(chosen):
        print(f"\n{sentence}", flush=True)
    notes(part["runs"], wrong)


def memory(parts: list[dict[str, Any]]) -> None:
    """Peak memory over baseline for each number of inner steps."""
    print("\n## Memory\n")
    print(f"{parts[0]['description'].rsplit(', ', 3)[0]}, second order, one task, one thread: peak resident memory")
    print("over what it was before the first step, in MB, by inner steps.\n")
    wrong = {name: why for part in parts for name, why in outliers(part["runs"]).items()}
    names = dict.fromkeys(run["name"] for part in parts for run in part["runs"])
    cells = {(run["name"], n): run for n, part in enumerate(parts) for run in part["runs"] if "error" not in run}
    rows = []
    for name in names:
        found = [cells.get((name, n)) for n in range(len(parts))]
        if any(found) and name not in wrong:
            rows.append([name, *(f"{run['peak_mb']:.0f}" if run else "-" for run in found)])
    table(["", *(str(part["workload"]["inner_steps"]) for part in parts)], rows)
    notes([run for part in parts for run in part["runs"]], wrong)


def omniglot(part: dict[str, Any]) -> None:
    """End to end, and sampling alone."""
    print("\n## Omniglot end to end\n")
    if "reason" in part:
        print(f"Not measured: {part['reason']}.")
        return
    print(f"{part['description']}; tasks are drawn while training. learn2learn decodes and turns image files as its")
    print("example does; metadist maps a table it has imported before. Sampling alone: one process of one thread.\n")
    good = [run for run in part["runs"] if "error" not in run]
    rows = []
    for title, sampling in (("trained", False), ("sampled", True)):
        chosen = best_settings([run for run in good if run["sampling"] == sampling])
        peers = fastest_peer(chosen)
        for name, runs in chosen.items():
            rates = [run["tasks_per_s"] for run in runs]
            ratios = [run["tasks_per_s"] / peers[run["round"]] for run in runs if run["round"] in peers]
            ratio = f"{median(ratios):.2f} ({spread(ratios)})" if ratios else "no peer"
            rows.append([title, name, threads(runs[0]), f"{median(rates):.4g} ({spread(rates)})", ratio])
    table(["", "", "processes", "tasks/s, median (min-max)", "of learn2learn"], rows)
    notes(part["runs"], {})


def best_settings(runs: Runs) -> dict[str, Runs]:
    """Each contender's runs at the thread count whose median is the best."""
    groups: dict[str, dict[int, Runs]] = {}
    for run in runs:
        groups.setdefault(run["name"], {}).setdefault(run["threads"], []).append(run)
    return {name: max(by.values(), key=lambda g: median(r["tasks_per_s"] for r in g)) for name, by in groups.items()}


def comparisons(chosen: dict[str, Runs]) -> list[str]:
    """metadist's fastest variant beside the fastest peer, and what runs in one process beside JAX: ratios of the same
    rounds."""
    own = [name for name, runs in chosen.items() if runs[0]["metadist"]]
    peers = [name for name in chosen if name not in own]
    if not own or not peers:
        return []

    def speed(name: str) -> float:
        return median(run["tasks_per_s"] for run in chosen[name])

    def ratios(name: str, other: str) -> list[float]:
        """How many times as fast as the other, in each round that has both."""
        others = {run["round"]: run["tasks_per_s"] for run in chosen[other]}
        return [run["tasks_per_s"] / others[run["round"]] for run in chosen[name] if run["round"] in others]

    best, rival = max(own, key=speed), max(peers, key=speed)
    fast = ratios(best, rival)
    sentences = [f"{best}: {median(fast):.2f} ({spread(fast)}) times the speed of the fastest peer, {rival}."] * bool(
        fast
    )
    for name in own if JAX in peers else []:
        slow = ratios(JAX, name)
        if chosen[name][0]["processes"] == 1 and slow:
            sentences.append(f"{name}: {median(slow):.2f} ({spread(slow)}) times the time that JAX takes.")
    return sentences


def fastest_peer(chosen: dict[str, Runs]) -> dict[int, float]:
    """For each round, the most tasks a second that a contender other than metadist reached in it."""
    rates: dict[int, float] = {}
    for run in (run for runs in chosen.values() for run in runs if not run["metadist"]):
        rates[run["round"]] = max(rates.get(run["round"], 0.0), run["tasks_per_s"])
    return rates


def outliers(runs: Runs) -> dict[str, str]:
    """Contenders whose first loss or gradient norm is not that of the others: they compute something else."""
    good = [run for run in runs if "check_loss" in run]
    wrong = {}
    for key, what in (("check_loss", "query loss"), ("check_norm", "norm of the mean meta-gradient")):
        usual = median(run[key] for run in good) if good else 0.0
        for run in good:
            if not abs(run[key] - usual) <= TOLERANCE * abs(usual):  # not a number is wrong, too
                wrong[run["name"]] = f"the first {what} is {run[key]:.6g}, the others' is {usual:.6g}"
    return wrong


def disagreements(results: dict[str, Any]) -> list[str]:
    parts = [*results["workloads"].values(), *results.get("memory", [])]
    return [name for part in parts for name in outliers(part["runs"])]


def notes(runs: Runs, wrong: dict[str, str]) -> None:
    """What is missing from a table, and why."""
    errors: dict[str, str] = {}
    for run in runs:
        if "error" in run:
            errors[f"{run['name']}, {threads(run)}"] = run["error"]
    if errors or wrong:
        print()
    for name, why in errors.items():
        print(f"- {name}: could not run: {why}")
    for name, why in wrong.items():
        print(f"- {name}: not compared, it computes something else: {why}")
    print(end="", flush=True)


def release(run: dict[str, Any]) -> str:
    """The package measured and its version."""
    own = [f"{name} {number}" for name, number in run["versions"].items() if name not in ("python", "torch", "numpy")]
    return own[0] if own else f"torch {run['versions']['torch']}"


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g}-{max(values):.3g}"


def table(header: list[str], rows: list[list[str]]) -> None:
    """A markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")
    print(end="", flush=True)
