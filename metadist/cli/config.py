"""`metadist config ...` and `metadist learners`: what can stand in a job file."""

import json
import shlex
from dataclasses import fields
from pathlib import Path

import click

from metadist.core.errors import InputError

ANY_ARGUMENTS = {"ignore_unknown_options": True}


@click.group("config")
def config_group() -> None:
    """Look at, check or begin a job file.

    \b
    metadist config new my_job
    metadist config show my_job.yaml num_workers=4
    """


@config_group.command(context_settings=ANY_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def show(arguments: tuple[str, ...]) -> None:
    """Print JOB.yaml [key=value ...] with every default filled in.

    \b
    metadist config show jobs/digits.yaml meta_lr=1e-2
    """
    from metadist.config import dump_config, load_config, split_arguments

    click.echo(dump_config(load_config(*split_arguments(arguments))), nl=False)


@config_group.command(context_settings=ANY_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def validate(arguments: tuple[str, ...]) -> None:
    """Say what is wrong with the settings of JOB.yaml [key=value ...], or that nothing is.

    \b
    metadist config validate jobs/digits.yaml

    Whether data, model, loss and learner fit together is what `metadist train --dry-run` finds out.
    """
    from metadist.config import load_config, split_arguments

    load_config(*split_arguments(arguments))
    click.echo("valid")


@config_group.command()
def schema() -> None:
    """The JSON schema of a job file, for editors.

    \b
    metadist config schema > job.schema.json
    """
    from metadist.config import Config

    click.echo(json.dumps(Config.model_json_schema(), indent=2))


@config_group.command()
@click.argument("name")
def new(name: str) -> None:
    """Write NAME.yaml, a job that runs as it is.

    \b
    metadist config new my_job
    """
    from metadist.config.template import new_job

    path = Path(name).with_suffix(".yaml")
    if path.exists():
        raise InputError(f"{path} exists; choose another name")
    path.write_text(new_job())
    click.echo(f"wrote {path}: metadist train {shlex.quote(str(path))}")


@click.command()
def learners() -> None:
    """The algorithms, with their papers, the engines that compute them and their options with defaults.

    \b
    metadist learners

    Options go into a job as learner.OPTION; learner.inner_optimizer is one of sgd, momentum and adam, with their
    arguments ({name: adam, beta1: 0}), or your own `module:callable`. jobs/learners/ has a job for each.
    """
    from metadist.learners import LEARNERS

    for name, (kind, preset, line) in LEARNERS.items():
        fixed = ("model", "loss", "inner_optimizer", *preset, *kind.refused)
        options = [f"{field.name}={field.default}" for field in fields(kind) if field.name not in fixed]
        options += ["inner_optimizer=sgd"] if "inner_optimizer" in kind.__dataclass_fields__ else []
        click.echo(f"{name:15} {line}")
        click.echo(f"{'':15} engines: {', '.join(kind.engines)}; {', '.join(options) or 'no options'}")
