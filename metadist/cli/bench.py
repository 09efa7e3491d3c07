"""`metadist bench`: what this machine makes of a job."""

import json
from typing import Any

import click

from metadist.cli.tables import table
from metadist.core.redaction import to_stderr


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--seconds", default=6.0, show_default=True, help="Measured for each way to compute.")
@click.option("--compile", "compiled", is_flag=True, help="Try compiled ones too, after 5 to 25 s each.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def bench(arguments: tuple[str, ...], seconds: float, compiled: bool, as_json: bool) -> None:
    """Measure instead of guessing: each way to compute JOB.yaml [key=value ...] on this machine, its speed and memory,
    and the override to put in the job.

    \b
    metadist bench jobs/omniglot_5way_1shot.yaml
    metadist bench jobs/digits.yaml learner.inner_steps=5 --compile
    """
    from metadist.run.bench import measure
    from metadist.run.job_file import load_config, split_arguments

    measured = measure(load_config(*split_arguments(arguments)), seconds, compiled, to_stderr)
    click.echo(json.dumps(measured, indent=2) if as_json else present(measured))


def present(measured: dict[str, Any]) -> str:
    """One worker's tasks per second by method, the parts of a meta-step, and what to change in the job."""
    best, own = measured["methods"][0], next((row for row in measured["methods"] if row["auto"]), None)
    shown = [{**row, "auto": "now" if row["auto"] else ""} for row in measured["methods"]]
    phases = ", ".join(f"{phase} {value:g}" for phase, value in measured["phases_ms_per_task"].items())
    if own is None or best["tasks_per_s"] > 1.05 * own["tasks_per_s"]:
        advice = f"fastest: {best['overrides']}"
        if own is not None and best["prepared_s"] > own["prepared_s"] + 1:
            gain = 1 / own["tasks_per_s"] - 1 / best["tasks_per_s"]
            advice += (
                f" (its preparation is earned back after {(best['prepared_s'] - own['prepared_s']) / gain:.0f} tasks)"
            )
    else:
        advice = "what the job uses now is as fast as any"
    threads, size = measured["threads"], measured["parameters"]
    device = f"one worker, {threads} torch thread(s), {measured['device']}, {size} parameters"
    parts = f"ms a task: {phases}; server: {measured['update_ms']:g} ms a step of {measured['meta_batch_size']} tasks"
    cells = [{name: _cell(value) for name, value in row.items()} for row in shown]
    return "\n".join([device, table(cells, left=0), "", parts, advice])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
