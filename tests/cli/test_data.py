"""`metadist data ...`: a command per importer, made from its signature."""

import inspect
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from click.testing import CliRunner

from metadist.cli.data import data
from metadist.data import importers, open_dataset


@pytest.mark.parametrize("name", importers.__all__)
def test_every_option_of_an_importer_is_explained_and_an_example_shown(name: str) -> None:
    typed = name.replace("_", "-")
    command = data.get_command(None, typed)  # type: ignore[arg-type]
    assert command is not None and command.help and f"metadist data {typed} " in command.help
    assert typed in data.list_commands(None)  # type: ignore[arg-type]
    known = {option.name: option for option in command.params}
    parameters = inspect.signature(getattr(importers, name)).parameters
    hints = get_type_hints(getattr(importers, name))
    assert known.keys() == parameters.keys() - {"progress"}
    for option in command.params:
        default = parameters[str(option.name)].default
        may_be_left_out = type(None) in get_args(hints[str(option.name)])
        assert option.required == (default is inspect.Parameter.empty and not may_be_left_out)
        assert default is inspect.Parameter.empty or option.default == default
        assert option.help  # type: ignore[attr-defined]


def test_options_reach_the_importer(tmp_path: Path) -> None:
    out = str(tmp_path / "set")
    done = CliRunner().invoke(data, ["sinusoid", "--groups", "3", "1", "2", "--points", "4", "--out", out])
    assert done.exit_code == 0 and "train 3 groups with 12 rows" in done.stdout
    assert open_dataset(out).metadata["options"] == {
        "importer": "sinusoid",
        "groups": [3, 1, 2],
        "points": 4,
        "seed": 0,
    }
    (tmp_path / "t.csv").write_text("user,age,y\n" + "".join(f"u{n % 3},{n},{n % 2}\n" for n in range(12)))
    table = ["table", "--source", str(tmp_path / "t.csv"), "--group", "user", "--input", "x=age,y", "--input", "age"]
    more = ["--target", "y", "--kind", "labelled", "--fractions", "1", "0", "0", "--standardize", "--overwrite"]
    assert CliRunner().invoke(data, [*table, *more, "--out", out]).exit_code == 0
    dataset = open_dataset(out)
    assert [field.name for field in dataset.fields] == ["x", "age", "y"] and list(dataset.splits) == ["train"]
    assert CliRunner().invoke(data, ["digits", "--upright", "--out", str(tmp_path / "digits")]).exit_code == 0
    assert len(open_dataset(tmp_path / "digits").splits["train"].group_names) == 4
    assert CliRunner().invoke(data, ["images", "--mode", "pink", "--source", "x", "--out", "y"]).exit_code == 2
