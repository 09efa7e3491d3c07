"""`metadist bench ...`: what this machine makes of a job, and how a run scales with workers."""

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import click

from metadist.cli.arguments import split_arguments
from metadist.core.redaction import to_stderr


class _WithDefault(click.Group):
    """A group whose `engines` may be left out: `metadist bench JOB.yaml`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named or not args else ["engines", *args])


@click.group(cls=_WithDefault)
def bench() -> None:
    """Measure instead of guessing.

    \b
    metadist bench jobs/digits.yaml
    metadist bench scaling
    """


@bench.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--seconds", default=6.0, show_default=True, help="Measured for each way to compute.")
@click.option("--compile", "compiled", is_flag=True, help="Try compiled ones too, after half a minute each.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def engines(arguments: tuple[str, ...], seconds: float, compiled: bool, as_json: bool) -> None:
    """Each way to compute JOB.yaml [key=value ...] on this machine: speed, memory, and the override to put in the job.

    \b
    metadist bench jobs/omniglot_5way_1shot.yaml
    metadist bench jobs/digits.yaml learner.inner_steps=5 --compile
    """
    from metadist.config import load_config
    from metadist.run.bench import measure

    told = measure(load_config(*split_arguments(arguments)), seconds, compiled, to_stderr)
    click.echo(json.dumps(told, indent=2) if as_json else present_engines(told))


def present_engines(told: dict[str, Any]) -> str:
    """One worker's tasks per second by method, the parts of a meta-step, and what to change in the job."""
    best, own = told["methods"][0], next((row for row in told["methods"] if row["auto"]), None)
    shown = [{**row, "auto": "now" if row["auto"] else ""} for row in told["methods"]]
    phases = ", ".join(f"{phase} {value:g}" for phase, value in told["phases_ms_per_task"].items())
    if own is None or best["tasks_per_s"] > 1.05 * own["tasks_per_s"]:
        advice = f"fastest: {best['overrides']}"
        if own is not None and best["prepared_s"] > own["prepared_s"] + 1:
            gain = 1 / own["tasks_per_s"] - 1 / best["tasks_per_s"]
            advice += (
                f" (its preparation is earned back after {(best['prepared_s'] - own['prepared_s']) / gain:.0f} tasks)"
            )
    else:
        advice = "what the job uses now is as fast as any"
    told_of = f"one worker, {told['threads']} torch thread(s), {told['device']}, {told['parameters']} parameters"
    parts = f"ms a task: {phases}; server: {told['update_ms']:g} ms a step of {told['meta_batch_size']} tasks"
    return "\n".join([told_of, _table(shown), "", parts, advice])


@bench.command()
@click.option("--simulated", default=128, show_default=True, help="Simulated workers; they sleep, so one machine can.")
@click.option("--chunk-s", default=0.25, show_default=True, help="Seconds a simulated chunk takes.")
@click.option("--chunks", default=16, show_default=True, help="Simulated chunks per worker and meta-step.")
@click.option("--parameters", default=112645, show_default=True, help="Size of theta; the default is a Conv4's.")
@click.option("--steps", default=4, show_default=True, help="Meta-steps timed for each figure.")
@click.option("--servers", default=2, show_default=True, help="Servers that theta is cut over, compared with one.")
@click.option("--quick", is_flag=True, help="A small version of everything, to see that it works.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def scaling(quick: bool, as_json: bool, **options: Any) -> None:
    """How a run scales: real workers on a small job, then simulated ones up to where driver and server saturate.

    \b
    metadist bench scaling
    metadist bench scaling --simulated 64 --chunk-s 0.1 --parameters 1000000 --servers 4

    Efficiency is the ideal step over the measured one, the ideal being as many chunks in a row as the busiest worker
    has and nothing else. Real workers: tasks per second and worker, against one worker.
    """
    import os

    from metadist.fleet.ray.cluster import connect, disconnect
    from metadist.run import scaling as measuring

    if quick:
        options |= {"simulated": 4, "chunk_s": 0.02, "chunks": 4, "parameters": 70000, "steps": 1, "servers": 1}
    cores = os.cpu_count() or 1
    counts = [1] if quick else sorted({count for count in (1, 2, 4, 8, 16, 32) if count < cores} | {cores})
    asked = measuring.Setting(
        options["simulated"], options["chunk_s"], options["parameters"], options["chunks"], steps=options["steps"]
    )
    with redirect_stdout(sys.stderr):  # where Ray writes what it thinks of so many workers
        started = connect(None, max(counts), to_stderr)
        try:
            told = measuring.report(asked, options["servers"], counts, to_stderr)
        finally:
            if started:
                disconnect()
    click.echo(json.dumps(told, indent=2) if as_json else present(told))


def present(told: dict[str, Any]) -> str:
    """The report as tables."""
    fleet, lines = told["fleet"], []
    for name, points in told["real"].items():
        lines += [f"real workers, {name} scaling", _table(points), ""]
    lines += [
        f"{fleet['workers']} simulated workers, which joined in {fleet['start_s']:.0f} s and have "
        f"{fleet['resident_mib']:.0f} MiB each: what was measured, and the cost model fitted to it",
        _table(told["measured"]),
        "",
        "saturation: workers that take no time",
        _table(told["saturation"]),
        "",
        "cost model: step = {step_s:.4f} s + workers * {worker_s:.5f} s + max(ideal, "
        "chunks * ((1 + servers) * {object_s:.3g} s + bytes * {byte_s:.3g} s / servers))".format(**told["model"]),
        "",
        "prediction, with these coefficients: simulated workers share this machine's cores with driver and servers;",
        "driver_alone: the efficiency if only the driver's CPU time per chunk limited it, all else having other cores",
        _table(told["predicted"]),
    ]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as aligned columns, the keys above."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
