"""A finished run evaluated again, under other settings of evaluation."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from metadist.config import Config, load_config
from metadist.config.load import shown
from metadist.core.files import private_files, writing
from metadist.run.build import Job
from metadist.run.directory import config_file, located, read_checkpoint, write_json
from metadist.run.fleets import open_fleet
from metadist.run.identity import check_evaluation, digest
from metadist.run.measures import log_evaluation, nested_tracker
from metadist.run.preflight import preflight
from metadist.run.results import evaluate_weights
from metadist.run.signals import Signals
from metadist.run.trust import check_trusted, check_usable, is_tracked, outside_address, outside_code, outside_place


def evaluate(
    config: Config,
    run: str | Path,
    *,
    checkpoint: str = "best",
    say: Callable[[str], None] = print,
    trust_code: bool = False,
    own: Collection[str] = (),
) -> dict[str, Any]:
    """Evaluate the weights of a run again.

    Args:
        config: the run's own configuration, with changes to `evaluation`, `data`, `engine`, `fleet` or `seed`.
        run: its directory. Everything is left in RUN/evaluations/NAME, one NAME per configuration.
        checkpoint: "best" by validation, "latest", or "step_00000200".
        say: takes progress, a line at a time.
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
    check_usable(config.checkpoint.location, config.fleet.address)
    saved = read_checkpoint(run, checkpoint, config.checkpoint.location)
    check_evaluation(saved.run["identity"], config)
    prepared = preflight(Job(config), [config.evaluation.split], saved)
    for note in prepared.notes:
        say(note)
    weights = prepared.weights(saved.step)
    folder = Path(run) / "evaluations" / digest({"config": shown(config), "step": saved.step})
    signals = Signals()
    with private_files():
        with writing(folder):
            folder.parent.mkdir(exist_ok=True)
            folder.mkdir(exist_ok=True)
        followed = is_tracked(config, trust_code, own)
        with nested_tracker(prepared, Path(run), folder, followed, say) as tracker:
            with open_fleet(prepared, config.num_workers, say, signals) as fleet, signals:
                results = evaluate_weights(prepared, fleet, weights, folder, say)
            write_json(results, folder / "results.json")
            log_evaluation(tracker, results, folder)
    return results | {"folder": str(folder)}


def check_followed(config: Config, run: str | Path, trust_code: bool, own: Collection[str]) -> None:
    """Raises InputError where evaluation would follow code, an address or a place that only the saved run names."""
    followed, saved = (
        outside_code(each) | outside_address(each) | outside_place(each, Path(run))
        for each in (config, load_config([config_file(run)]))
    )
    check_trusted(run, {key: name for key, name in followed.items() if saved.get(key) == name}, trust_code, own)
