"""How a run stands, read from its directory while it may go on, and how to end one that runs on this machine."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from metadist.checkpoint.journal import journalled_hashes, journalled_measure, read_journal
from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.files import LOCK_FILE, here, is_uri, lock_holder, read_file
from metadist.run.mirror import METRICS_FILE, name_of, run_file, working_folder
from metadist.run.saved import config_file
from metadist.run.tracker import close_stale
from metadist.run.trust import is_tracked
from metadist.tracking.best import Best
from metadist.tracking.jsonl import read_metrics

STALE_S = 60.0
"""A running job that has written nothing for longer is said to be silent."""
JOURNAL_FILE = "journal.jsonl"


def status(run: str | Path) -> dict[str, Any]:
    """How the run in a directory stands.

    `state`: "running" (a driver has its lock), "finished", "evaluation failed" or "stopped" (of a
    run at a URI, whose files are those of its newest checkpoint, or run by another machine); `step` of `meta_steps`;
    `loss`, as logged last; `best`, its `metric`, and `best_step` by validation; `workers` of `target`; `saved_step` and
    `saved_age_s` of the newest checkpoint that the run goes on from or has written since; `age_s` of the newest
    metrics; `silent_s` since a running one wrote anything; `doing`: "evaluating" where a running one has done all its
    meta-steps. What is not known yet is left out. Raises InputError where it is no run.

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
    metrics = run_file(run, METRICS_FILE)
    rows = _standing(read_metrics(metrics) if metrics.exists() else [])
    journal = read_journal(run_file(run, JOURNAL_FILE))
    best = Best(journalled_measure(journal))
    found |= {"step": 0, "meta_steps": config.meta_steps}
    for row in rows:  # of which the newest is last
        found |= {key: row[name] for key, name in _SHOWN.items() if "train/loss" in row}
        best.offer(row, row["step"])
    if rows:
        found["age_s"] = round(now - rows[-1]["time"], 1)
    if driver:
        found["silent_s"] = round(now - _last_written(working_folder(str(run))), 1)
    if best.step is not None:
        found |= {"best": best.value, "metric": best.measure.name, "best_step": best.step}
    found |= _progress(journal, now)
    return found | ({"doing": "evaluating"} if driver and found["step"] >= config.meta_steps else {})


_SHOWN = {"step": "step", "loss": "train/loss", "workers": "workers/alive", "target": "workers/target"}


def unseen(run: str | Path) -> str:
    """Why no run is to be seen in that directory from this machine, "" where one is."""
    try:
        config_file(run)
    except InputError as error:
        return str(error)
    return ""


def _results(path: Path) -> dict[str, Any]:
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError):
        return {}


def _standing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics without those of later steps than a run went on from afterwards, which it computes again."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] > row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _progress(records: list[dict[str, Any]], now: float) -> dict[str, Any]:
    """`step`, `saved_step` and `saved_age_s` by the journal: a meta-step that is applied again shows that the
    checkpoints of later ones were not gone on from, as they were removed or damaged."""
    journalled_hashes(records)  # which refuses a damaged one
    found: dict[str, Any] = {}
    saved: dict[int, Any] = {}
    for record in records:
        if "done" in record:
            saved[record["done"]] = record.get("time")
        elif type(record.get("applied")) is int:
            found["step"] = record["applied"] + 1
            saved = {step: at for step, at in saved.items() if step <= record["applied"]}
    if saved:
        found["saved_step"] = max(saved)
        at = saved[max(saved)]
        found |= {"saved_age_s": round(now - at, 1)} if isinstance(at, float) else {}  # not noted by earlier metadists
    return found


def _last_written(folder: Path) -> float:
    """When the driver that has the folder was last heard of; it wrote the lock when it began."""
    files = [folder / name for name in (LOCK_FILE, JOURNAL_FILE, METRICS_FILE)]
    return max(file.stat().st_mtime for file in files if file.exists())


def close_in_mlflow(run: str | Path) -> str:
    """Show a run as KILLED that MLflow still shows as running though its driver is gone, and say so in a sentence;
    "" where there is nothing to do. A server that only the saved run names is not asked."""
    config = load_config([config_file(run)])
    if is_uri(run) or not config.tracking.mlflow:
        return ""
    if not is_tracked(config, False, ()):
        return (
            f"not asked: only the saved run names {name_of(config.tracking.uri or '')}; set MLFLOW_TRACKING_URI to it"
        )
    return close_stale(Path(run), config.tracking.uri)


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
        lines.append(("metrics", _ago(found["age_s"])))
    if "doing" in found:
        lines.append(("doing", f"{found['doing']}, which writes nothing until its end"))
    elif found.get("silent_s", 0) > STALE_S:
        saved = found["step"] == found.get("saved_step")  # as at an end before the last meta-step, too
        see = "it evaluates if training has ended early, else see the job's log" if saved else "see the job's log"
        lines.append(("silent", f"it last wrote something {_ago(found['silent_s'])}: {see}"))
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
    try:
        os.kill(int(process[1]), signal.SIGTERM)
    except PermissionError:
        raise InputError(f"{run} is run by {holder}, another user's: stop it as that user") from None
    deadline = time.monotonic() + timeout_s
    while lock_holder(path) == holder:
        if time.monotonic() > deadline:
            raise InputError(f"{holder} has not ended {timeout_s:.0f} s after it was asked to: `kill -9 {process[1]}`")
        time.sleep(0.2)
    return status(run)
