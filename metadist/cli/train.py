"""`metadist train`."""

import json
from pathlib import Path

import click

from metadist.cli.config import ANY_ARGUMENTS
from metadist.cli.report import next_commands, report
from metadist.cli.runs import TRUST
from metadist.core.files import finite


@click.command(context_settings=ANY_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--resume", help="auto: continue what is in run_dir, or start; or the path of a run or checkpoint.")
@click.option("--address", help="Ray cluster, such as ray-head:6379; default RAY_ADDRESS, else one is started here.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, train nothing.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@TRUST
def train(
    arguments: tuple[str, ...], resume: str | None, address: str | None, dry_run: bool, quiet: bool, as_json: bool,
    trust_code: bool,
) -> None:  # fmt: skip
    """Train JOB.yaml [key=value ...], then evaluate.

    \b
    metadist train jobs/digits.yaml num_workers=2 --resume auto
    """
    from metadist.run import api
    from metadist.run.job_file import load_config, split_arguments
    from metadist.run.package import check_client

    check_client()
    files, overrides = split_arguments(arguments)
    if not files and not overrides:
        raise click.UsageError("name a job file, such as jobs/digits.yaml (`metadist config new` writes one)")
    if address:
        overrides.append(f"fleet.address={address}")
    config = load_config(files, overrides)
    if config.run_dir is None:
        name = Path(files[-1]).stem if files else "run"
        config = config.model_copy(update={"run_dir": str(Path("runs", name).absolute())})
    if dry_run:
        click.echo(json.dumps(api.dry_run(config), indent=2))
        return
    results = api.train(config, resume=resume, quiet=quiet, trust_code=trust_code)
    if as_json:
        click.echo(json.dumps(finite(results), indent=2))
        return
    click.echo(f"{report(results)}\n\n{next_commands(config, results)}")
