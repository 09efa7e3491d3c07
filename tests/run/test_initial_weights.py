import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.data import Shapes
from metadist.run.build import Job
from metadist.run.initial_weights import load_weights, renamed

VECTORS = Shapes([[4]], False, None, 3, True)
OURS = ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "head.weight"]


def network() -> nn.ModuleDict:
    return nn.ModuleDict({
        "layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 3, bias=False)
    })  # fmt: skip


def file_of(tmp_path, tensors: dict[str, Tensor]) -> str:
    save_file(tensors, tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


def loaded(
    tmp_path, tensors: dict[str, Tensor], names: dict[str, str | None] | None = None
) -> tuple[nn.ModuleDict, str]:
    """A network with the weights of a file, and what is said of it."""
    settings = load_config([], ["data.family=digits"]).model
    settings = settings.model_copy(update={"weights": file_of(tmp_path, tensors), "weight_names": names or {}})
    torch.manual_seed(0)
    module = network()
    return module, load_weights(module, settings)


def numbered() -> dict[str, Tensor]:
    """Other numbers for each of the network's names."""
    return {name: torch.full_like(value, 1.0 + n) for n, (name, value) in enumerate(network().state_dict().items())}


def test_a_file_with_the_models_names_fills_it_without_a_word(tmp_path):
    module, said = loaded(tmp_path, numbered())
    assert said == ""
    assert all(torch.equal(value, numbered()[name]) for name, value in module.state_dict().items())


def test_names_of_others_are_mapped_by_patterns_and_the_rest_is_said_with_counts(tmp_path):
    own = numbered()
    theirs = {f"bert.block.{n}.dense.{kind}": own[f"layers.{n}.{kind}"] for n in (0, 1) for kind in ("weight", "bias")}
    theirs |= {"bert.pooler.weight": torch.ones(5), "cls.weight": torch.ones(90, 2)}
    module, said = loaded(tmp_path, theirs, {"bert.block.*.dense.*": "layers.*.*", "cls.*": None})
    torch.manual_seed(0)
    assert torch.equal(module["head"].weight, network()["head"].weight)
    assert all(torch.equal(module.state_dict()[name], own[name]) for name in OURS[:4])
    assert "fills 4 of" in said and "1 keep their own initial values (head.weight)" in said
    assert "2 names of the file are not used (bert.pooler.weight, cls.weight)" in said


@pytest.mark.parametrize(("tensors", "names", "message"), [
    ({"other.weight": torch.ones(2)}, {}, "none of its names"),
    ({"head.weight": torch.ones(90, 2)}, {}, r"'head.weight' is float32 \[90, 2\] .* float32 \[3, 2\]"),
    ({"head.weight": torch.ones(3, 2, dtype=torch.int64)}, {}, r"int64 \[3, 2\]"),
    ({"head.weight": torch.ones(3, 2)}, {"haed.*": "head.*"}, r"no name in the file is 'haed.\*'"),
    ({"cls.weight": torch.ones(3, 2)}, {"cls.weight": "heads.weight"}, "no 'heads.weight'.*head.weight"),
    ({"cls.weight": torch.ones(3, 2), "head.weight": torch.ones(3, 2)}, {"cls.*": "head.*"}, "cls.weight, head.weight"),
    ({"cls.weight": torch.ones(3, 2)}, {"cls.*": "*.*"}, r"more \* than"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(tmp_path, tensors, names, message):
    with pytest.raises(InputError, match=message):
        loaded(tmp_path, tensors, names)


def test_the_first_pattern_that_matches_counts():
    names = {"a.0.*": "layers.1.*", "a.*": "layers.*"}
    assert renamed(["a.0.bias", "a.0.weight", "a.1.x"], names, OURS) == {
        "a.0.bias": "layers.1.bias", "a.0.weight": "layers.1.weight", "a.1.x": "layers.1.x"
    }  # fmt: skip


def test_tied_weights_are_filled_by_either_name(tmp_path):
    settings = load_config([], ["data.family=digits"]).model
    module = network()
    module["layers"][1].weight = module["layers"][0].weight
    given = {name: value for name, value in numbered().items() if name != "layers.0.weight"}
    said = load_weights(module, settings.model_copy(update={"weights": file_of(tmp_path, given)}))
    assert said == ""
    assert torch.equal(module["layers"][0].weight, given["layers.1.weight"])


def test_weights_of_half_precision_are_taken(tmp_path):
    module, _ = loaded(tmp_path, {name: value.bfloat16() for name, value in numbered().items()})
    assert module["head"].weight.dtype == torch.float32 and module["head"].weight.unique().tolist() == [5.0]


def test_the_run_says_it(tmp_path):
    path = file_of(tmp_path, {"head.weight": torch.ones(3, 4)})
    job = load_config([], ["data.family=digits", "model.name=mlp", "model.hidden=[]", f"model.weights={path}"])
    note = Job(job, VECTORS).fresh_model().note
    assert re.search(r"1 keep their own initial values \(head.bias\)", note)
