"""Everything that would be checked before a run, and its plan; nothing is trained."""

from dataclasses import asdict
from typing import Any

from metadist.config import Config
from metadist.core.redaction import to_stderr
from metadist.run.build import Job
from metadist.run.fleets import check_cluster
from metadist.run.identity import digest, run_identity
from metadist.run.mirror import name_of
from metadist.run.places import checked
from metadist.run.preflight import preflight
from metadist.run.resume import evaluated_splits, find_checkpoint
from metadist.run.trust import unloadable


def dry_run(config: Config) -> dict[str, Any]:
    """Everything `train` would check before its first step, and the plan."""
    config = checked(config)
    check_cluster(config)
    find_checkpoint(config, "auto")
    prepared = preflight(Job(config), evaluated_splits(config), gradient=True, say=to_stderr)
    config, engine = prepared.job.config, prepared.engine
    return {
        "run_dir": name_of(config.run_dir or ""),
        "learner": config.learner.name,
        "parameters": engine.layout.size,
        "engine": asdict(engine.method),
        "memory_per_worker": prepared.memory(),
        "chunk_size": prepared.chunk_size,
        "tasks_per_step": config.batch_size(config.num_workers),
        "workers": config.num_workers,
        "inputs": prepared.job.shapes.inputs,
        "outputs": prepared.job.shapes.outputs,
        "meta_gradient": prepared.gradient,
        "baselines": list(prepared.baselines),
        "resolved": prepared.resolved(),
        "notes": [*prepared.notes, *unloadable(config)],
        "identity": digest(run_identity(prepared.job, engine)),
    }
