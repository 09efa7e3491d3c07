"""How a run stands, read from its directory while it may go on, and how to end one that runs on this machine."""

import json
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from metadist.checkpoint.journal import journalled_hashes, read_journal
from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.files import here, is_uri, lock_holder, read_file
from metadist.run.mirror import name_of, run_file, working_folder
from metadist.run.saved import config_file
from metadist.tracking.jsonl import read_metrics

STALE_S = 60.0
"""A running job whose metrics are older than this is said to be stale."""


def status(run: str | Path) -> dict[str, Any]:
    """How the run in a directory stands.

    `state`: "running" (a driver has its lock), "finished", "evaluation failed" or "stopped" (of a
    run at a URI, whose files are those of its newest checkpoint, or run by another machine); `step` of `meta_steps`;
    `loss`, as logged last; `best`, its `metric`, and `best_step` by validation; `workers` of `target`; `saved_step` and
    `saved_age_s` of the newest checkpoint; `age_s` of the newest metrics. What is not known yet is left out. Raises
    InputError where it is no run.

    Example:
        >>> from metadist.run.status import status
        >>> status("runs/digits")["state"]  # doctest: +SKIP
        'finished'
    """
    config, results, now = load_config([config_file(run)]), _results(run_file(run, "results.json")), time.time()
    driver = lock_holder(working_folder(str(run)))
    stopped = "stopped, or run by another machine" if is_uri(run) else "stopped"
    ended = "finished" if "protocol" in results else "evaluation failed" if results else stopped
    found: dict[str, Any] = {"run_dir": name_of(str(run)), "state": "running" if driver else ended}
    found |= {"driver": driver} if driver else {}
    found |= {"step": 0, "meta_steps": config.meta_steps}
    metrics = run_file(run, "metrics.jsonl")
    rows = read_metrics(metrics) if metrics.exists() else []
    for row in rows:  # of which the newest is last
        found |= {key: row[name] for key, name in _SHOWN.items() if "train/loss" in row}
    if rows:
        found["age_s"] = round(now - rows[-1]["time"], 1)
    found |= _best(rows)
    if saved := journalled_hashes(read_journal(run_file(run, "journal.jsonl"))):
        found["saved_step"] = max(saved)
        before = [row["time"] for row in rows if row["step"] <= max(saved)]
        found |= {"saved_age_s": round(now - before[-1], 1)} if before else {}
    return found


_SHOWN = {"step": "step", "loss": "train/loss", "workers": "workers/alive", "target": "workers/target"}


def is_seen(run: str | Path) -> bool:
    """Whether there is a run in that directory, as far as this machine sees it."""
    return run_file(run, "config.yaml").exists()


def _results(path: Path) -> dict[str, Any]:
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError):
        return {}


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The best validation so far, by accuracy where there are classes."""
    higher = any("validation/accuracy" in row for row in rows)
    metric = "accuracy" if higher else "loss"
    measured = [
        (row[f"validation/{metric}"], row["step"]) for row in rows
        if math.isfinite(row.get(f"validation/{metric}", math.nan)) and not row.get("validation/diverged_tasks")
    ]  # fmt: skip
    if not measured:
        return {}
    value, step = max(measured) if higher else min(measured)
    return {"best": value, "metric": metric, "best_step": step}


def described(found: dict[str, Any]) -> str:
    """A status as lines for people."""
    share = found["step"] / found["meta_steps"]
    lines = [("state", found["state"] + (f" ({found['driver']})" if "driver" in found else "")),
             ("step", f"{found['step']}/{found['meta_steps']} ({share:.1%})")]  # fmt: skip
    if "loss" in found:
        lines.append(("loss", f"{found['loss']:.4g}"))
    if "best" in found:
        value = f"{found['best']:.1%}" if found["metric"] == "accuracy" else f"{found['best']:.4g}"
        lines.append(("best", f"validation {found['metric']} {value} at step {found['best_step']}"))
    if "workers" in found:
        lines.append(("workers", f"{found['workers']:g} of {found['target']:g}"))
    if "saved_step" in found:
        age = f", {_ago(found['saved_age_s'])}" if "saved_age_s" in found else ""
        lines.append(("saved", f"at step {found['saved_step']}{age}"))
    if "age_s" in found:
        stale = found["state"] == "running" and found["age_s"] > STALE_S
        lines.append(
            ("metrics", _ago(found["age_s"]) + (": nothing has come since, see the job's log" if stale else ""))
        )
    lines.append(("run_dir", found["run_dir"]))
    lines += [(key, str(found[key])) for key in ("job", "mlflow") if key in found]
    return "\n".join(f"{key:10} {value}" for key, value in lines)


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def stop_here(run: str | Path, timeout_s: float = 300.0) -> dict[str, Any]:
    """Have the driver of a run on this machine save and end, and wait until it has; how the run stands then.

    Raises InputError where no driver has it, where that is on another machine, or where it does not end in time.
    """
    config_file(run)
    path = working_folder(str(run))
    holder = lock_holder(path)
    if holder is None:
        raise InputError(f"no driver runs {run} on this machine: if it is a job on a cluster, add --address")
    process, machine = re.fullmatch(r"process (\d+)", holder.partition(" on ")[0]), holder.partition(" on ")[2]
    if process is None or machine != here().partition(" on ")[2]:
        raise InputError(f"{run} is run by {holder}: stop it there, or with --address of the cluster it is a job of")
    os.kill(int(process[1]), signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while lock_holder(path) == holder:
        if time.monotonic() > deadline:
            raise InputError(f"{holder} has not ended {timeout_s:.0f} s after it was asked to: `kill -9 {process[1]}`")
        time.sleep(0.2)
    return status(run)
