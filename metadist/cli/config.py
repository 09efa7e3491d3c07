"""`metadist config ...` and `metadist learners`: what can stand in a job file."""

import json
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click

from metadist.core.errors import InputError
from metadist.core.redaction import to_stderr

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
    """Print JOB.yaml [key=value ...] with every default filled in, and what `auto` stands for where its data is there.

    \b
    metadist config show jobs/digits.yaml meta_lr=1e-2
    """
    from metadist.config import shown
    from metadist.config.yaml import commented
    from metadist.run.job_file import load_config, split_arguments
    from metadist.run.resolved import decided, without_run

    config = load_config(*split_arguments(arguments))
    tree = shown(config)
    try:
        chosen = decided(config, without_run(config))
        comments = dict.fromkeys(chosen, "chosen by metadist")
    except InputError as error:
        to_stderr(f"auto is not resolved: {error}")
        chosen, comments = {}, dict.fromkeys(_left_open(tree), "decided when the run begins")
    for key, value in chosen.items():
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = value
    click.echo(commented(tree, comments), nl=False)


def _left_open(tree: dict[str, Any], section: str = "") -> list[str]:
    """The dotted keys that are `auto`."""
    open_keys = []
    for key, value in tree.items():
        open_keys += _left_open(value, f"{section}{key}.") if isinstance(value, dict) else []
        open_keys += [section + key] if value == "auto" else []
    return open_keys


@config_group.command(context_settings=ANY_ARGUMENTS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def validate(arguments: tuple[str, ...]) -> None:
    """Say what is wrong with the settings of JOB.yaml [key=value ...], or that nothing is.

    \b
    metadist config validate jobs/digits.yaml

    Whether data, model, loss and learner fit together is what `metadist train --dry-run` finds out.
    """
    from metadist.run.job_file import load_config, split_arguments

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
@click.option("--data", "place", help="A dataset directory, or its URI: the job suits it, each choice with its reason.")
@click.option("--learner", help="One of `metadist learners`; default: one that suits the data.")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
def new(name: str, place: str | None, learner: str | None, overwrite: bool) -> None:
    """Write NAME.yaml, a job that runs as it is.

    \b
    metadist config new my_job
    metadist config new my_job --data data/my_images --learner protonet
    """
    path = Path(name).with_suffix(".yaml")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or replace it with --overwrite")
    if place or learner:
        from metadist.run.new_job import suited_job

        text, notes = suited_job(place, learner)
        for note in notes:
            to_stderr(f"note: {note}")
    else:
        from metadist.config.template import new_job

        text = new_job()
    path.write_text(text)
    click.echo(f"wrote {path}: metadist train {shlex.quote(str(path))}")


@click.command()
def learners() -> None:
    """The algorithms, with their papers, the engines that compute them and their options with defaults.

    \b
    metadist learners

    Options go into a job as learner.OPTION; learner.inner_optimizer is one of sgd, momentum and adam, with their
    arguments ({name: adam, beta1: 0}), or your own `module:callable`. jobs/learners/ has a job for each, jobs/domains/
    those of policy_gradient.
    """
    from metadist.learners import LEARNERS

    for name, (kind, preset, line) in LEARNERS.items():
        fixed = ("model", "loss", "inner_optimizer", *preset, *kind.refused)
        own = [field for field in fields(kind) if field.name not in fixed]
        options = [each.name if each.default is MISSING else f"{each.name}={each.default}" for each in own]
        options += ["inner_optimizer=sgd"] if "inner_optimizer" in kind.__dataclass_fields__ else []
        click.echo(f"{name:15} {line}")
        click.echo(f"{'':15} engines: {', '.join(kind.engines)}; {', '.join(options) or 'no options'}")
