import pytest
import torch
from torch import Tensor

from metadist.core.errors import InputError
from metadist.engine import Engine, Method
from metadist.engine.remedies import is_out_of_memory, out_of_memory
from metadist.learners import MAML
from metadist.models.losses import cross_entropy
from tests.engine.networks import model_of, tasks_of


def learner_of(**options) -> MAML:
    return MAML(model=model_of("mlp"), loss=cross_entropy, **options)


@pytest.mark.parametrize(("method", "options", "num_tasks", "settings"), [
    (Method("vmap"), {"inner_steps": 5}, 32,
     ["engine.chunk_size=16 (now 32 tasks at once)", "engine.kind=loop", "differentiation=remat", "first_order=true"]),
    (Method("vmap"), {"inner_steps": 5}, 1, ["differentiation=remat", "not 5", "first_order=true"]),
    (Method("loop"), {"inner_steps": 1}, 4, ["first_order=true"]),
    (Method("loop"), {"inner_steps": 5, "first_order": True}, 4, []),
    (Method("loop", "remat"), {"inner_steps": 50}, 4, ["engine.keep=sqrt", "first_order=true"]),
    (Method("loop", "remat", 7), {"inner_steps": 50}, 4, ["first_order=true"]),
    (Method("loop", "remat"), {"inner_steps": 3}, 4, ["first_order=true"]),
])  # fmt: skip
def test_the_sentence_names_the_settings_that_help_here_the_cheapest_first(method, options, num_tasks, settings):
    sentence = out_of_memory(learner_of(**options), method, num_tasks)
    assert sentence.startswith(f"memory ran out while computing {num_tasks} task{'s' if num_tasks > 1 else ''}: set ")
    places = [sentence.index(setting) for setting in [*settings, "task.queries or task.shots"]]
    assert places == sorted(places)
    every = ["chunk_size", "kind=loop", "differentiation=remat", "keep=sqrt", "first_order=true"]
    assert [each in sentence for each in every] == [any(each in setting for setting in settings) for each in every]


@pytest.mark.parametrize(("error", "is_memory"), [
    (MemoryError(), True),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000000 bytes"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ValueError("x"), False),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_an_engine_turns_lack_of_memory_and_nothing_else_into_an_input_error(kind, error, is_memory):
    assert is_out_of_memory(error) == is_memory

    def fails(outputs: Tensor, target: Tensor) -> Tensor:
        raise error

    engine = Engine(MAML(model=model_of("mlp"), loss=fails), kind)
    theta, tasks = engine.initial_theta(), tasks_of("mlp")
    for compute in (
        lambda: engine.meta_gradients(theta, tasks),
        lambda: engine.evaluate(theta, tasks, {"loss": fails}),
    ):
        with pytest.raises(InputError if is_memory else type(error)) as raised:
            compute()
        if is_memory:
            assert str(raised.value) == out_of_memory(engine.learner, engine.method, 2)
            assert raised.value.__cause__ is error
        else:
            assert raised.value is error


def test_a_tensor_no_machine_can_hold_is_such_an_error():
    def huge(outputs: Tensor, target: Tensor) -> Tensor:
        return outputs.sum() + torch.empty(1 << 50).sum()

    engine = Engine(MAML(model=model_of("mlp"), loss=huge))
    with pytest.raises(InputError, match=r"memory ran out while computing 2 tasks: set learner.first_order=true"):
        engine.meta_gradients(engine.initial_theta(), tasks_of("mlp"))
