import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from metadist import load as load_run
from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.task import Examples, Task
from metadist.data.importers import text
from metadist.engine import Engine
from metadist.learners import MAML
from metadist.models import Encoder, Model
from metadist.models.encoder import Layer
from metadist.models.losses import cross_entropy
from metadist.run.api import train

from ..learners.small import differences, distance

TOKENS = torch.tensor([[5, 7, 9, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
MASK = TOKENS != 0


def encoder(**options) -> Encoder:
    """A small one, in float64, with branches and adapters that are not near zero."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"vocabulary_size": 20, "width": 8, "layers": 2, "heads": 2, "head_width": 4} | options
    module = Encoder([[6], [6]], 3, **given).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * (name != "head.bias"))
    return module


def task(seed: int) -> Task:
    """Sentences of random tokens and lengths, 2 of each of 3 classes to adapt on."""
    draws = np.random.default_rng(seed)

    def texts(count: int) -> tuple[np.ndarray, np.ndarray]:
        mask = np.arange(6) < draws.integers(1, 7, size=(count, 1))
        return np.where(mask, draws.integers(2, 20, size=(count, 6)), 0).astype(np.int32), mask

    support, query = Examples(texts(6), (np.arange(3).repeat(2),)), Examples(texts(9), (np.arange(3).repeat(3),))
    return Task(support, query)


def lora(module: Encoder, **options) -> MAML:
    options = {"inner_lr": 0.3, "inner_steps": 2, "adapted": "*lora_*, head.*"} | options
    return MAML(model=Model(module), loss=cross_entropy, **options)


def test_padding_changes_no_output():
    module = encoder()
    assert torch.equal(module(TOKENS, MASK), module(torch.where(MASK, TOKENS, 13), MASK))
    short = module(TOKENS[:1, :3], MASK[:1, :3])
    assert torch.allclose(short, module(TOKENS, MASK)[:1], atol=1e-12, rtol=0)
    assert not torch.allclose(module(TOKENS, torch.ones_like(MASK)), module(TOKENS, MASK), atol=1e-3)


def test_the_order_of_tokens_matters():
    module = encoder()
    assert not torch.allclose(module(TOKENS[:, [1, 0, 2, 3, 4, 5]], MASK), module(TOKENS, MASK), atol=1e-3)


def test_a_text_without_tokens_has_finite_outputs_and_gradients():
    module = encoder()
    module(TOKENS, torch.zeros_like(MASK)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def torchs_own(module: Encoder) -> nn.TransformerEncoder:
    """torch's encoder with the same weights."""
    layer = nn.TransformerEncoderLayer(8, 2, 128, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64)
    whole = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for own, layer in zip(cast(list[Layer], list(module.layers)), whole.layers, strict=True):
        parts = [own.query, own.key, own.value]
        names = {
            "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
            "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
        }
        pairs = {"self_attn.out_proj": own.out, "linear1": own.up, "linear2": own.down}
        pairs |= {"norm1": own.norm_attention, "norm2": own.norm_feedforward}
        for name, part in pairs.items():
            names |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
        layer.load_state_dict({name: value.detach() for name, value in names.items()})
    return whole.double()


def test_its_layers_are_those_of_torch():
    module = encoder()
    x = module.tokens(TOKENS) + module.positions.weight
    x = torchs_own(module)(x, src_key_padding_mask=~MASK)
    importance = (10 * module.importance(TOKENS)).squeeze(-1).masked_fill(~MASK, -torch.inf).softmax(dim=1)
    expected = module.head(module.norm(torch.einsum("nlw,nl->nw", x, importance)))
    assert torch.allclose(module(TOKENS, MASK), expected, atol=1e-12, rtol=0)


def test_at_the_start_all_tokens_count_alike_and_adapters_change_nothing():
    torch.manual_seed(0)
    module = Encoder([[6], [6]], 3, vocabulary_size=20, width=8, layers=0)
    mean = torch.stack([(module.tokens(row[row != 0]) + module.positions.weight[: (row != 0).sum()]).mean(0)
                        for row in TOKENS])  # fmt: skip
    assert torch.allclose(module.features(TOKENS, MASK), module.norm(mean), atol=1e-6)
    assert torch.equal(module(TOKENS, MASK), module.head.bias.expand(2, 3))
    torch.manual_seed(0)
    adapted = Encoder([[6], [6]], 3, vocabulary_size=20, width=8, lora_rank=2)
    plain = Encoder([[6], [6]], 3, vocabulary_size=20, width=8)
    plain.load_state_dict({n: v for n, v in adapted.state_dict().items() if "lora_" not in n})
    assert torch.equal(plain.features(TOKENS, MASK), adapted.features(TOKENS, MASK))


def test_an_adapter_adds_a_product_of_low_rank_to_query_and_value_weights():
    module = encoder(lora_rank=2, lora_alpha=6)
    adapters = {name for name, _ in module.named_parameters() if "lora_" in name}
    assert adapters == {f"layers.{i}.{p}.lora_{m}" for i in (0, 1) for p in ("query", "value") for m in "ab"}
    merged = encoder()
    merged.load_state_dict({n: v for n, v in module.state_dict().items() if "lora_" not in n})
    with torch.no_grad():
        for own, layer in zip(merged.layers, module.layers, strict=True):
            for name in ("query", "value"):
                part = getattr(layer, name)
                getattr(own, name).weight.add_(3 * part.lora_b @ part.lora_a)
    assert torch.allclose(merged(TOKENS, MASK), module(TOKENS, MASK), atol=1e-12, rtol=0)


def test_of_a_frozen_base_adapters_and_head_are_learned_and_the_rest_is_constant():
    learner = lora(encoder(lora_rank=2, frozen_base=True))
    assert learner.adapted_names() == list(learner.model.parameters)
    assert {"tokens.weight", "positions.weight", "importance.weight", "norm.weight", "layers.1.value.weight"} <= set(
        learner.model.constants
    )
    with pytest.raises(ValueError, match="lora_rank"):
        Encoder([[6], [6]], 3, frozen_base=True)


def numeric(learner: MAML) -> Tensor:
    engine = Engine(learner, "loop", dtype=torch.float64)
    tensors = engine.tensors(task(1))

    def adapted_loss(theta: Tensor) -> Tensor:
        return cross_entropy(engine.adapt(theta, tensors.support)(*tensors.query.inputs), *tensors.query.targets)

    return differences(adapted_loss, engine.initial_theta())


@pytest.mark.parametrize("frozen", [True, False])
def test_mamls_gradient_through_the_adapters_is_the_derivative(frozen):
    small = {"width": 4, "layers": 1, "head_width": 2, "feedforward": 3, "lora_rank": 1, "frozen_base": frozen}
    expected = numeric(lora(encoder(**small)))
    for kind in ("loop", "vmap"):
        engine = Engine(lora(encoder(**small)), kind, dtype=torch.float64)
        assert distance(engine.meta_gradients(engine.initial_theta(), [task(1)]).rows[0], expected) < 1e-7
    engine = Engine(lora(encoder(**small), first_order=True), "loop", dtype=torch.float64)
    assert distance(engine.meta_gradients(engine.initial_theta(), [task(1)]).rows[0], expected) > 1e-3


def test_all_tasks_at_once_are_as_one_by_one():
    rows = []
    for kind in ("loop", "vmap"):
        engine = Engine(lora(encoder(lora_rank=2)), kind, dtype=torch.float64)
        rows.append(engine.meta_gradients(engine.initial_theta(), [task(seed) for seed in range(3)]).rows)
    assert distance(rows[1], rows[0]) < 1e-9


WORDS = ["red green blue", "one two three", "cat dog cow", "rain snow sun", "bread milk egg", "run walk swim"]


def sentences(folder: Path) -> Path:
    """A dataset of 6 classes with 9 texts each, divided over all splits."""
    lines = [
        {"text": f"{word} {other} {number}", "label": str(label), "split": ("train", "validation", "test")[label // 2]}
        for label, words in enumerate(WORDS)
        for number, (word, other) in enumerate((a, b) for a in words.split() for b in words.split())
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return text(folder / "texts.jsonl", folder / "texts", split_column="split", length=8)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> tuple[list[str], Path]:
    """A job of adapters, but for its base, and the weights of a run that are one."""
    folder = tmp_path_factory.mktemp("pretrained")
    own = [
        f"data.path={sentences(folder)}", "task.ways=2", "task.shots=2", "task.queries=2", "model.name=encoder",
        "model.width=8", "meta_batch_size=4", "engine.chunk_size=2", "meta_steps=3",
        "evaluation.every=0", "evaluation.test_tasks=4", "evaluation.baselines=[]", "tracking.mlflow=false",
        "fleet.backend=local",
    ]  # fmt: skip
    train(load_config([], [*own, "learner.name=protonet", f"run_dir={folder / 'run'}"]), quiet=True)
    adapters = [
        *own, "model.lora_rank=2", "model.frozen_base=true", "learner.name=protomaml",
        "learner.adapted=*lora_*, head.*", "learner.inner_steps=2",
    ]  # fmt: skip
    return adapters, next(folder.glob("run/checkpoints/step_*3/weights.safetensors"))


def test_a_run_with_a_base_of_another_run_has_the_same_bits_with_two_workers(pretrained, tmp_path):
    """Adapters on a frozen base, which stays as it was."""
    adapters, base = pretrained
    own = [*adapters, f"model.weights={base}"]
    found = [
        train(load_config([], [*own, f"run_dir={tmp_path / str(n)}", f"num_workers={n}"]), quiet=True) for n in (1, 2)
    ]
    assert found[0]["theta_sha256"] == found[1]["theta_sha256"]
    assert found[0]["accuracy"] == found[1]["accuracy"]
    before = load(base)
    after = load(next((tmp_path / "1").glob("checkpoints/step_*3/weights.safetensors")))
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert any(after[name].any() for name in after if "lora_b" in name)


def test_adapters_on_a_base_that_is_not_trained_are_refused(pretrained, tmp_path):
    adapters, base = pretrained
    save_file({name: value for name, value in load(base).items() if name != "layers.0.up.weight"}, tmp_path / "part")
    for unfilled, told in (([], "model.weights=FILE"), ([f"model.weights={tmp_path / 'part'}"], "layers.0.up.weight")):
        with pytest.raises(InputError, match=told):
            train(load_config([], [*adapters, *unfilled, f"run_dir={tmp_path / 'run'}"]), quiet=True)


def test_a_finished_run_has_its_base_in_its_checkpoint(pretrained, tmp_path):
    adapters, base = pretrained
    own = [*adapters, f"model.weights={tmp_path / 'base'}", f"run_dir={tmp_path / 'run'}"]
    shutil.copy(base, tmp_path / "base")
    train(load_config([], own), quiet=True)
    longer = load_config([], [*own, "meta_steps=4", "evaluation.baselines=[initial]"])
    assert "initial" in train(longer, resume="auto", quiet=True)["baselines"]
    (tmp_path / "base").unlink()
    adapted = load_run(tmp_path / "run").adapt(["red green", "one two"], ["colour", "number"])
    assert set(adapted.predict(["blue red", "two three"])) <= {"colour", "number"}


def load(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)
