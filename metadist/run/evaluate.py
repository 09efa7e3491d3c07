"""A finished run evaluated again, under other settings of evaluation."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from metadist.config import Config, load_config, shown
from metadist.run.build import Job
from metadist.run.fleets import Cluster, open_fleet
from metadist.run.identity import check_evaluation, digest
from metadist.run.judge import evaluate_weights
from metadist.run.measures import nested_tracker
from metadist.run.mirror import new_files, run_file
from metadist.run.places import located
from metadist.run.preflight import preflight
from metadist.run.saved import config_file, read_checkpoint, write_json
from metadist.run.signals import Signals
from metadist.run.trust import (
    check_trusted,
    check_usable,
    is_tracked,
    outside_address,
    outside_code,
    outside_data,
    outside_place,
)


def evaluate(
    config: Config,
    run: str | Path,
    *,
    checkpoint: str = "best",
    say: Callable[[str], None] = print,
    doing: Callable[[str, int, int], None] = lambda *progress: None,
    trust_code: bool = False,
    own: Collection[str] = (),
) -> dict[str, Any]:
    """Evaluate the weights of a run again.

    Args:
        config: the run's own configuration, with changes to `evaluation`, `data`, `engine`, `fleet` or `seed`.
        run: its directory. Everything is left in RUN/evaluations/NAME, one NAME per configuration.
        checkpoint: "best" by validation, "latest", or "step_00000200".
        say: takes progress, a line at a time.
        doing: takes what is being done, how much of it is, and of how much.
        trust_code: follow code, addresses and places that only the saved run names.
        own: settings (dotted keys) that the user gave himself, which are followed without.

    Returns the figures as `train` does, and `folder`. Raises InputError that names what is not trusted or does not fit.

    Example:
        >>> import metadist
        >>> config = metadist.load_config(["runs/digits/config.yaml"], ["evaluation.inner_steps=10"])  # doctest: +SKIP
        >>> metadist.evaluate(config, "runs/digits")["accuracy"]["after"]  # doctest: +SKIP
        {'mean': 0.95, 'ci95': 0.004, 'diverged_tasks': 0}
    """
    config = located(config)
    check_followed(config, run, trust_code, own)
    check_usable(config.checkpoint.location, config.fleet.address, config.data.path, config.model.weights)
    saved = read_checkpoint(run, checkpoint, config.checkpoint.location)
    check_evaluation(saved.run["identity"], config)
    job = Job(config)
    job.make_parts()
    with Cluster(config, config.num_workers, say) as cluster:
        prepared = preflight(job, [config.evaluation.split], saved, say=say, begin=cluster.begin_workers)
        for note in prepared.notes:
            say(note)
        name, signals = f"evaluations/{digest({'config': shown(config), 'step': saved.step})}", Signals()
        followed = is_tracked(config, trust_code, own)
        with new_files(run, name) as (folder, place), nested_tracker(prepared, run, name, folder, followed, say) as log:
            with open_fleet(cluster, prepared, prepared.job.config.num_workers, say, signals) as fleet, signals:
                numbers = run_file(run, "metrics.jsonl")
                weights = prepared.weights(saved.step)
                results = evaluate_weights(prepared, fleet, weights, folder, say, str(run), numbers, doing)
            results["resolved"] = prepared.resolved()
            write_json(results, folder / "results.json")
            log(results)
    return results | {"folder": place}


def check_followed(config: Config, run: str | Path, trust_code: bool, own: Collection[str]) -> None:
    """Raises InputError where evaluation would follow code, an address or a place that only the saved run names."""
    followed, saved = (
        outside_code(each) | outside_address(each) | outside_place(each, Path(run)) | outside_data(each, run)
        for each in (config, load_config([config_file(run)]))
    )
    check_trusted(run, {key: name for key, name in followed.items() if saved.get(key) == name}, trust_code, own)
