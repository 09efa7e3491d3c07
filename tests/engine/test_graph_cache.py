import ctypes
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from metadist.core.errors import InputError
from metadist.core.task import Task
from metadist.engine import Engine, Method
from metadist.engine.graph_cache import AFTER, SHAPES, Program, shortened
from metadist.engine.recording import RecordedTensor, record
from metadist.learners import MAML, Learner, Reptile
from metadist.learners.inner_optimizers import Adam
from metadist.models.losses import cross_entropy
from tests.engine.networks import model_of, tasks_of
from tests.learners.small import classification_task, distance
from tests.learners.unusual import Annealed, AnnealedByIndex, AnnealedByUnpacking

KINDS = ["loop", "vmap"]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and bfloat16 need a GPU")


def on_gpu(test: Callable) -> Callable:
    return pytest.mark.gpu(needs_gpu(test))


class Beginning(MAML):
    """Fast weights that begin further from theta at each meta-step."""

    def begin(self, theta, support, context):
        fast = super().begin(theta, support, context)
        return fast._replace(weights={name: weight * (1 + context.step) for name, weight in fast.weights.items()})


def engine_of(kind: str | Method, loss: Callable = cross_entropy, learner: type[Learner] = MAML, **options) -> Engine:
    return Engine(
        learner(model=model_of("mlp"), loss=loss, **({"inner_steps": 2} | options)), kind, dtype=torch.float64
    )


def warm_up(engine: Engine, tasks: list[Task]) -> None:
    """Until a computation that can be played back is."""
    theta = engine.initial_theta()
    for number in range(AFTER + 1):
        engine.meta_gradients(theta + 0.01 * number, tasks)


def without_targets(task: Task, number: int) -> Task:
    target = task.query.targets[0].copy()
    target[:number] = -1
    return task._replace(query=task.query._replace(targets=(target,)))


def counted(calls: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return cross_entropy(outputs, target)

    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_played_back_after_so_many_calls_with_the_same_bits(kind):
    calls: list[int] = []
    engine = engine_of(kind, counted(calls))
    theta = engine.initial_theta()
    called = []
    for number in range(AFTER + 4):
        at, given = theta + 0.01 * number, tasks_of("mlp", 1, first=number)
        calls.clear()
        found = engine.meta_gradients(at, given)
        called.append(len(calls))
        fresh = engine_of(kind).meta_gradients(at, given)
        assert torch.equal(found.rows, fresh.rows) and torch.equal(found.losses, fresh.losses)
    assert called == [3] * (AFTER - 1) + [6, 3, 0, 0, 0]  # recorded, then compared with two calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learner", [MAML, Beginning])
def test_an_evaluation_is_played_back_with_the_same_bits(kind, learner):
    calls: list[int] = []

    def halved(outputs: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(outputs, target) / 2

    engine = engine_of(kind, learner=learner)
    theta, metrics = engine.initial_theta(), {"loss": counted(calls)}
    for number in range(AFTER + 4):
        given, at = tasks_of("mlp", 1, first=number), theta + 0.01 * number
        calls.clear()
        found = engine.evaluate(at, given, metrics, step=number, meta_steps=40)["loss"]
        fresh = engine_of(kind, learner=learner).evaluate(at, given, metrics, step=number, meta_steps=40)["loss"]
        assert torch.equal(found, fresh)
    assert len(calls) == (3 if learner is MAML else 6)  # of the fresh engine alone, where no meta-step is read
    assert torch.equal(engine.evaluate(at, given, {"loss": halved}, step=number, meta_steps=40)["loss"], fresh / 2)


@dataclass
class Scaled:
    """A metric that has no hash, as it is compared by its fields."""

    by: float

    def __call__(self, outputs: Tensor, target: Tensor) -> Tensor:
        return self.by * cross_entropy(outputs, target)


def test_a_metric_need_not_be_hashable():
    engine, tasks = engine_of("loop"), tasks_of("mlp", 1)
    theta, twice = engine.initial_theta(), Scaled(2.0)
    for number in range(AFTER + 3):
        found = engine.evaluate(theta + 0.01 * number, tasks, {"loss": cross_entropy, "twice": twice})
    assert torch.equal(found["twice"], 2 * found["loss"])
    (known,) = engine._evaluation._records.values()
    assert known.play is not None


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_query_by_query_is_not_recorded(kind):
    calls: list[int] = []
    engine, tasks = engine_of(kind), tasks_of("mlp", 1)
    for _ in range(AFTER + 4):
        calls.clear()
        found = engine.evaluate(engine.initial_theta(), tasks, {"loss": counted(calls)}, transductive=False)["loss"]
    assert calls
    fresh = engine_of(kind).evaluate(engine.initial_theta(), tasks, {"loss": cross_entropy}, transductive=False)
    assert torch.equal(found, fresh["loss"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"inner_batch": 3}, {"inner_batch": 3, "inner_optimizer": Adam()}])
def test_what_a_task_drew_is_not_part_of_the_recording(kind, options):
    engine, fresh = (engine_of(kind, learner=Reptile, **options) for _ in range(2))
    tasks = tasks_of("mlp")
    warm_up(engine, tasks)
    theta = engine.initial_theta()
    first, second = (engine.meta_gradients(theta, tasks, step).rows for step in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(second, fresh.meta_gradients(theta, tasks, 2).rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "learner",
    [
        Annealed,
        AnnealedByUnpacking,
        AnnealedByIndex,
    ],
)
def test_a_learner_that_reads_the_meta_step_is_computed_anew_at_each(learner, kind):
    engine, fresh = (engine_of(kind, learner=learner) for _ in range(2))
    theta, tasks = engine.initial_theta(), tasks_of("mlp")
    warm_up(engine, tasks)
    for step, meta_steps in ((0, 10), (7, 10), (7, 14)):
        found, expected = (each.meta_gradients(theta, tasks, step, meta_steps) for each in (engine, fresh))
        assert torch.equal(found.rows, expected.rows)


def noisy() -> Callable[[Tensor, Tensor], Tensor]:
    draws = np.random.default_rng(0)
    return lambda outputs, target: cross_entropy(outputs + float(draws.normal()), target) * float(draws.uniform(1, 2))


def drops(outputs: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(F.dropout(outputs, 0.5), target)


def branches(outputs: Tensor, target: Tensor) -> Tensor:
    loss = cross_entropy(outputs, target)
    return loss if loss.detach() < 0 else 2 * loss


def of_some(outputs: Tensor, target: Tensor) -> Tensor:
    given = target >= 0
    return F.cross_entropy(outputs[given], target[given], reduction="none").mean()


def by_number(outputs: Tensor, target: Tensor) -> Tensor:
    given = target >= 0
    return F.cross_entropy(outputs, target.clamp(min=0)) / len(target[given])


@pytest.mark.parametrize("loss", [noisy(), drops], ids=["numpy", "torch"])
def test_chance_outside_the_tasks_key_is_not_frozen_by_a_recording(loss):
    engine, tasks = engine_of("loop", loss), tasks_of("mlp", 1)
    warm_up(engine, tasks)
    theta = engine.initial_theta()
    losses = {float(engine.meta_gradients(theta, tasks).losses[0]) for _ in range(5)}
    assert len(losses) == 5


@pytest.mark.parametrize(
    "loss",
    [branches, of_some, by_number],
    ids=["branch", "mask", "number"],
)
def test_a_loss_that_depends_on_values_goes_on_being_called(loss):
    engine, fresh = (engine_of("loop", loss) for _ in range(2))
    theta = engine.initial_theta()
    warm_up(engine, tasks_of("mlp"))
    tasks = [without_targets(task, 4) if loss is not branches else task for task in tasks_of("mlp", 3, first=5)]
    assert torch.equal(engine.meta_gradients(theta, tasks).rows, fresh.meta_gradients(theta, tasks).rows)


def test_a_loss_that_branches_at_some_values_is_not_played_back_for_others():
    def clipped(outputs: Tensor, target: Tensor) -> Tensor:
        loss = cross_entropy(outputs, target)
        return loss if bool(target.sum() > 0) else 10 * loss

    engine, fresh = (engine_of("loop", clipped) for _ in range(2))
    theta, task = engine.initial_theta(), tasks_of("mlp", 1)[0]
    warm_up(engine, [task])
    other = task._replace(query=task.query._replace(targets=(0 * task.query.targets[0],)))
    assert torch.equal(engine.meta_gradients(theta, [other]).rows, fresh.meta_gradients(theta, [other]).rows)


@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes_have_their_own_recording(kind):
    engine, fresh = (engine_of(kind) for _ in range(2))
    theta = engine.initial_theta()
    warm_up(engine, tasks_of("mlp"))
    tasks = [classification_task(seed, shots=3) for seed in range(2)]
    for _ in range(AFTER):
        found = engine.meta_gradients(theta, tasks)
    assert torch.equal(found.rows, fresh.meta_gradients(theta, tasks).rows)
    integers = [task.map(lambda x: np.round(x).astype(np.int64)) for task in tasks]
    assert torch.equal(engine.meta_gradients(theta, integers).rows, fresh.meta_gradients(theta, integers).rows)


def test_no_more_than_so_many_shapes_are_recorded():
    calls: list[int] = []

    def double(structure, step, meta_steps, tensors):
        calls.append(len(tensors[0]))
        return [2 * tensors[0]]

    program = Program(double)
    for size in range(1, SHAPES + 4):
        for number in range(AFTER + 1):
            program((), 0, 1, [torch.full((size,), float(number))])
    calls.clear()
    for size in range(1, SHAPES + 4):
        assert torch.equal(program((), 0, 1, [torch.full((size,), 3.0)])[0], torch.full((size,), 6.0))
    assert calls == list(range(SHAPES + 1, SHAPES + 4))


def test_dtype_and_structure_tell_recordings_apart():
    program = Program(lambda structure, step, meta_steps, tensors: [tensors[0] * structure[0]])
    for _ in range(AFTER + 1):
        program((2,), 0, 1, [torch.ones(3)])
    assert program((5,), 0, 1, [torch.ones(3)])[0].tolist() == [5, 5, 5]
    assert program((2,), 0, 1, [torch.ones(3, dtype=torch.int64)])[0].dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_not_overwritten_by_later_calls(kind):
    engine, tasks = engine_of(kind, inner_steps=0), tasks_of("mlp")
    theta = engine.initial_theta()
    warm_up(engine, tasks)
    first = engine.meta_gradients(theta, tasks)
    kept = first.rows.clone(), first.losses.clone()
    second = engine.meta_gradients(theta + 1, tasks_of("mlp", first=3))
    assert torch.equal(first.rows, kept[0]) and torch.equal(first.losses, kept[1])
    first.rows.fill_(9)
    assert not (second.rows == 9).any()
    assert torch.equal(engine.meta_gradients(theta, tasks).rows, kept[0])


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_equal_to_rounding(kind):
    eager, compiled = engine_of(kind), engine_of(Method(kind, compiled=True))
    theta = eager.initial_theta()
    for first in (0, 5):
        tasks = tasks_of("mlp", 2, first)
        found, expected = (engine.meta_gradients(theta + first, tasks) for engine in (compiled, eager))
        assert distance(found.rows, expected.rows) < 1e-9 and distance(found.losses, expected.losses) < 1e-9


@needs_compiler
@pytest.mark.wide
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_network_of_convolutions_is_equal_to_rounding():
    eager, compiled = (
        Engine(
            MAML(model=model_of("conv4"), loss=cross_entropy), Method("loop", compiled=compiled), dtype=torch.float64
        )
        for compiled in (False, True)
    )
    theta, tasks = eager.initial_theta(), tasks_of("conv4", 2)
    found, expected = (engine.meta_gradients(theta, tasks) for engine in (compiled, eager))
    assert distance(found.rows, expected.rows) < 1e-9 and distance(found.losses, expected.losses) < 1e-9


def test_what_nobody_takes_of_a_convolutions_derivative_is_not_computed():
    """Weights that do not adapt need no gradient of the support set's."""

    def computed(adapted: str) -> int:
        learner = MAML(model=model_of("conv4"), loss=cross_entropy, adapted=adapted, first_order=True)
        engine = Engine(learner, dtype=torch.float64)
        tasks, theta = tasks_of("conv4", 1), engine.initial_theta()
        expected = engine.meta_gradients(theta, tasks).rows
        warm_up(engine, tasks)
        assert torch.equal(engine.meta_gradients(theta, tasks).rows, expected)
        operations = [node for node in engine.operations(tasks) if "convolution_backward" in str(node.target)]
        return sum(bool(node.args[-1][1]) for node in operations)

    assert (computed("*"), computed("body.0.*")) == (6, 3)


@pytest.mark.parametrize(("adapted", "along"), [("*", 2), ("body.0.*", 1)])
def test_a_convolutions_second_derivative_does_not_convolve_zeros(adapted, along):
    """Three convolutions of the support set, three of the query set, and of the derivative's own derivative one along
    the images and, where weights adapt, one along these."""
    engine = Engine(MAML(model=model_of("conv4"), loss=cross_entropy, adapted=adapted), dtype=torch.float64)
    operations = [str(node.target) for node in engine.operations(tasks_of("conv4", 1))]
    assert operations.count("aten.convolution.default") == 3 + 3 + 3 * along


@pytest.mark.parametrize(("kind", "options", "sentence"), [
    ("loop", {"learner": Annealed}, "engine.compile=true: the learner depends on the meta-step"),
    ("vmap", {"learner": AnnealedByUnpacking}, "the learner depends on the meta-step"),
    ("loop", {"loss": drops}, "other numbers at every call"),
])  # fmt: skip
def test_what_cannot_be_compiled_is_said(kind, options, sentence):
    engine = engine_of(Method(kind, compiled=True), **options)
    with pytest.raises(InputError, match=sentence):
        engine.meta_gradients(engine.initial_theta(), tasks_of("mlp"))


def test_a_branch_cannot_be_compiled_and_is_said():
    engine = engine_of(Method("loop", compiled=True), loss=branches)
    with pytest.raises(InputError, match="engine.compile=true cannot record this computation"):
        engine.meta_gradients(engine.initial_theta(), tasks_of("mlp"))


@pytest.mark.parametrize("method", [Method(captured=True), Method(autocast=True)], ids=["captured", "autocast"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(method):
    with pytest.raises(InputError, match="engine.cuda_graphs and engine.autocast are for GPUs"):
        engine_of(method)


def on_cuda(network: str, method: Method, inner_steps: int = 2, calls: int = 1) -> Tensor:
    learner = MAML(model=model_of(network), loss=cross_entropy, inner_steps=inner_steps, inner_lr=0.05)
    engine = Engine(learner, method, "cuda")
    theta = engine.initial_theta()
    for _ in range(calls - 1):
        engine.meta_gradients(theta + 1, tasks_of(network, 4, first=9))
    return engine.meta_gradients(theta, tasks_of(network, 4)).rows


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["mlp", "conv4"])
def test_captured_it_has_the_same_bits(network, kind):
    expected = on_cuda(network, Method(kind))
    assert torch.equal(on_cuda(network, Method(kind, captured=True), calls=AFTER + 2), expected)


@on_gpu
def test_captured_results_are_not_overwritten_by_later_calls():
    engine = Engine(MAML(model=model_of("mlp"), loss=cross_entropy), Method("vmap", captured=True), "cuda")
    theta = engine.initial_theta()
    for _ in range(AFTER + 1):
        first = engine.meta_gradients(theta, tasks_of("mlp")).rows
    kept = first.clone()
    engine.meta_gradients(theta + 1, tasks_of("mlp", first=3))
    assert torch.equal(first, kept)


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(kind):
    wide = on_cuda("conv4", Method(kind, autocast=True))
    assert wide.dtype == torch.float32
    assert distance(wide, on_cuda("conv4", Method(kind))) < 0.05


@on_gpu
@pytest.mark.parametrize("network", ["mlp", "conv4", "pooled", "resnet12"])
def test_loop_and_vmap_agree(network):
    assert distance(on_cuda(network, Method("vmap")), on_cuda(network, Method("loop"))) < 1e-3


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_many_inner_steps_cost_the_memory_of_one(kind):
    expected = on_cuda("mlp", Method(kind), inner_steps=64)
    assert distance(on_cuda("mlp", Method(kind, "remat", 8), inner_steps=64), expected) < 1e-3
    peaks = []
    for steps in (1, 64):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        on_cuda("conv4", Method(kind, "remat"), inner_steps=steps)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    size = sum(value.numel() for value in model_of("conv4").parameters.values()) * 4
    assert peaks[1] - peaks[0] < 2 * 64 * size * (4 if kind == "vmap" else 1) + (1 << 20)


def simulated(way: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss whose weights come from a simulator outside torch, given the outputs' numbers in one of the ways there
    are: a function of them alone, so that every call can be computed again."""

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        del target
        numbers = outputs.detach()
        taken = {
            "numpy": lambda: numbers.numpy(),
            "tolist": lambda: np.array(numbers.tolist()),
            "item": lambda: np.array([[x.item() for x in row] for row in numbers]),
            "array": lambda: np.asarray(numbers),
            "dlpack": lambda: np.from_dlpack(numbers),
            "capsule": lambda: torch.from_dlpack(torch.utils.dlpack.to_dlpack(numbers)).clone().numpy(),
            "pointer": lambda: np.ctypeslib.as_array(
                ctypes.cast(numbers.contiguous().data_ptr(), ctypes.POINTER(ctypes.c_double)), tuple(numbers.shape)
            ).copy(),
            "float": lambda: np.full(tuple(numbers.shape), float(numbers.sum())),
            "sorted": lambda: np.array([sorted(row, key=float) for row in numbers.unbind()], float),
            "format": lambda: np.array([[float(f"{x.item():.17g}") for x in row] for row in numbers]),
            "swallowed": lambda: swallowed(numbers),
        }[way]()
        return (outputs * torch.from_numpy(np.tanh(3 * taken) + 1).to(outputs)).mean()

    return loss


def swallowed(numbers: Tensor) -> np.ndarray:
    """As code that has another way where this one fails."""
    try:
        return numbers.numpy()
    except Exception:
        return np.zeros(tuple(numbers.shape))


WAYS = ["numpy", "tolist", "item", "array", "dlpack", "capsule", "pointer", "float", "sorted", "format", "swallowed"]


@pytest.mark.parametrize("way", WAYS)
def test_what_leaves_torch_is_no_constant_of_a_recording(way):
    engine = engine_of("loop", simulated(way))
    theta = engine.initial_theta()
    for number in range(AFTER + 4):
        task = tasks_of("mlp", 1, first=number)
        found = engine.meta_gradients(theta + 0.3 * number, task).rows
        assert torch.equal(found, engine_of("loop", simulated(way)).meta_gradients(theta + 0.3 * number, task).rows)


@pytest.mark.parametrize("way", ["numpy", "dlpack", "item"])
def test_nor_can_it_be_compiled(way):
    engine = engine_of(Method("loop", compiled=True), simulated(way))
    with pytest.raises(InputError, match="engine.compile=true cannot record this computation .* leaves torch"):
        engine.meta_gradients(engine.initial_theta(), tasks_of("mlp"))


def test_a_recording_that_does_not_repeat_other_tasks_is_not_used():
    """A function that does something else as soon as it is recorded, and nothing that the recording could notice."""
    calls: list[int] = []

    def function(structure, step, meta_steps, tensors):
        calls.append(1)
        return [tensors[0] * 2 if isinstance(tensors[0], RecordedTensor) else tensors[0] * 3]

    program = Program(function)
    for number in range(AFTER + 5):
        assert program((), 0, 1, [torch.full((2,), float(number))])[0].tolist() == [3 * number] * 2
    assert len(calls) == AFTER + 5 + 1


def test_a_compiled_computation_that_gives_other_numbers_is_refused(monkeypatch):
    program = Program(lambda structure, step, meta_steps, tensors: [tensors[0] * 3], compiled=True)
    monkeypatch.setattr(torch, "compile", lambda graph, **options: lambda x: [x * 3.3])
    with pytest.raises(InputError, match="gives other numbers than the computation itself"):
        program((), 0, 1, [torch.ones(2)])


def test_a_recording_keeps_no_results_once_it_is_known_to_be_right():
    program = Program(lambda structure, step, meta_steps, tensors: [tensors[0] * 3])
    for number in range(AFTER + 1):
        program((), 0, 1, [torch.full((2,), float(number))])
    (known,) = program._records.values()
    assert known.play is not None and known.last is None


def test_a_recording_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr("metadist.engine.graph_cache.LONGEST_S", 0.0)
    monkeypatch.setattr("metadist.engine.graph_cache.LONGEST_CALLS", 0)
    engine, fresh = (engine_of("loop") for _ in range(2))
    calls: list[int] = []
    engine.learner.__dict__["loss"] = counted(calls)
    theta = engine.initial_theta()
    for number in range(AFTER + 3):
        calls.clear()
        tasks = tasks_of("mlp", 1, first=number)
        found = engine.meta_gradients(theta, tasks).rows
        assert calls and torch.equal(found, fresh.meta_gradients(theta, tasks).rows)


def test_engines_in_two_threads_do_not_spoil_each_others_recordings():
    """One reads the meta-step in every call; what the other records does not depend on that."""
    played: list[int] = []
    reading, steady = engine_of("loop", learner=Annealed), engine_of("loop", counted(played))
    ended = threading.Event()

    def read_on() -> None:
        while not ended.is_set():
            reading.meta_gradients(reading.initial_theta(), tasks_of("mlp", 1), 3, 10)

    thread = threading.Thread(target=read_on)
    thread.start()
    try:
        for number in range(AFTER + 2):
            steady.meta_gradients(steady.initial_theta(), tasks_of("mlp", 1, first=number))
    finally:
        ended.set()
        thread.join()
    assert "wrapper" not in torch.nn.Module.__call__.__qualname__  # torch.fx has taken its patch back
    played.clear()
    steady.meta_gradients(steady.initial_theta(), tasks_of("mlp", 1, first=90))
    assert not played


def played(function, *tensors: Tensor) -> tuple[list[Tensor], int]:
    """What a recording gives once it is shortened, and how many operations are left."""
    recording = record(function, *tensors)
    play = shortened(recording)
    return list(play(*tensors)), sum(node.op == "call_function" for node in recording.graph.nodes)


def test_a_shortened_recording_leaves_out_what_only_copies():
    x, w = torch.randn(4, 3), torch.randn(3, 3)
    (y,), operations = played(lambda x, w: (torch.mm(torch.cat([x], 1) * 1, w) * 1,), x, w)
    assert operations == 1 and torch.equal(y, x @ w)


def test_a_shortened_recording_keeps_a_copy_that_is_written_to():
    x, before = torch.randn(4, 3), torch.zeros(4, 3)
    before.copy_(x)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        copy, other, third = torch.cat([x], 1), x * 1, torch.cat([x], 0)
        copy.view(12).add_(1)
        third[1].mul_(2)
        third.split([1, 3])[1].add_(1)
        return copy, other, third, x + 0.5

    expected = [before + 1, before, torch.stack([before[0], 2 * before[1] + 1, before[2] + 1, before[3] + 1])]
    found, _ = played(function, x)
    assert torch.equal(x, before)
    assert [torch.equal(a, b) for a, b in zip(found, [*expected, before + 0.5], strict=True)] == [True] * 4


def in_place(x: Tensor) -> tuple[Tensor, ...]:
    rows, columns, third = x + 0, x + 1, torch.empty_like(x)
    rows.unsqueeze_(1)
    columns.t_()
    torch.add(rows[:, 0], columns.T, out=third)
    return rows.expand(-1, 2, -1).reshape(-1), columns @ columns.new_ones(columns.shape[1]), third, rows.sum(0)


def test_a_recording_follows_shapes_changed_in_place_and_results_put_elsewhere():
    x = torch.arange(6.0).reshape(2, 3)
    found, _ = played(in_place, x)
    assert found[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert found[1].tolist() == [1 + 4, 2 + 5, 3 + 6]
    assert found[2].tolist() == [[1, 3, 5], [7, 9, 11]]
    assert found[3].tolist() == [[3, 5, 7]]


def test_a_shortened_recording_keeps_the_kind_of_number():
    (y,), operations = played(lambda x: (x * 1.0,), torch.arange(3))
    assert operations == 1 and y.dtype == torch.float32


def near(number: int) -> Tensor:
    """Four numbers between 0 and 1."""
    return torch.rand(4, generator=torch.Generator().manual_seed(number))


def programmed(function: Callable[[Tensor], Tensor], calls: int = AFTER + 3) -> Callable[[Tensor], Tensor]:
    """`function` as a program that has seen only numbers between 0 and 1."""
    program = Program(lambda structure, step, meta_steps, tensors: [function(tensors[0])])
    for number in range(calls):
        program((), 0, 1, [near(number)])
    return lambda x: program((), 0, 1, [x.clone()])[0]


def clamps_elsewhere(x: Tensor) -> Tensor:
    torch.clamp(x, -2, 2, out=torch.empty(4))
    return x * 1


def clamps_after_a_copy(x: Tensor) -> Tensor:
    y = x.unsqueeze(0) * 2
    copy = y.unbind(0)[0] * 1
    y.clamp_(-2, 2)
    return copy


def puts_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y.data = y.data.clamp(-4, 4)
    return y


def finite(x: Tensor) -> Tensor:
    try:
        large = bool((x > 2).any())
    except RuntimeError:
        large = False
    return 0 * x if large else x


def finite_in_numpy(x: Tensor) -> Tensor:
    try:
        large = bool((np.asarray(x) > 2).any())
    except RuntimeError:
        large = False
    return 0 * x if large else x


def negative_in_words(x: Tensor) -> Tensor:
    return 0 * x if "-" in f"{x.min()}" else x


def from_a_factor(x: Tensor) -> Tensor:
    """sqrt(4 - sum x) where that is real."""
    try:
        return torch.linalg.cholesky((4 - x.sum()).reshape(1, 1)).flatten()
    except RuntimeError:
        return torch.full((1,), -1.0)


def by_place(x: Tensor) -> Tensor:
    try:
        return x[x.long()]
    except IndexError:
        return torch.full((4,), -1.0)


@library.custom_op("metadist_tests::above", mutates_args=())
def above(x: Tensor) -> Tensor:
    return x[x > -1].clone()


def of_any_length(x: Tensor) -> Tensor:
    found = above(x)
    return found.sum() / len(found)


def packed(x: Tensor) -> Tensor:
    lengths = torch.where(x > 2, 2, 1)
    rows = torch.nn.utils.rnn.pack_padded_sequence(torch.ones(4, 2), lengths, batch_first=True, enforce_sorted=False)
    return x.new_full((1,), len(rows.data))


@pytest.mark.parametrize(("function", "expected"), [
    (clamps_elsewhere, [9, -5, 0.5, 3]),
    (clamps_after_a_copy, [18, -10, 1, 6]),
    (puts_in_place, [4, -4, 1, 4]),
    (finite, [0, 0, 0, 0]),
    (finite_in_numpy, [0, 0, 0, 0]),
    (negative_in_words, [0, 0, 0, 0]),
    (from_a_factor, [-1]),
    (by_place, [-1, -1, -1, -1]),
    (of_any_length, 12.5 / 3),
    (packed, [6]),
])  # fmt: skip
def test_what_the_first_calls_did_not_show_is_right_in_later_ones(function, expected):
    x = torch.tensor([9.0, -5.0, 0.5, 3.0])
    assert torch.equal(programmed(function)(x), torch.tensor(expected))


def test_infinity_times_one_is_no_copy_where_it_is_complex():
    function = programmed(lambda x: torch.view_as_real(torch.complex(1 / x, x) * 1))
    assert function(torch.zeros(4)).isnan().any(dim=1).all()


def test_what_a_function_keeps_of_its_recording_is_a_tensor_like_others():
    kept: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        kept.append(x.detach() * 2)
        kept[-2:-1] and kept[-2] + 1
        return x

    programmed(function)
    assert any(isinstance(each, RecordedTensor) for each in kept)
    numbers = [*range(AFTER), AFTER - 1, AFTER]  # the last of the first calls is recorded
    assert torch.equal(torch.stack(kept), torch.stack([2 * near(number) for number in numbers]))
    assert [each.numpy().tolist() for each in kept] == [(2 * near(number)).tolist() for number in numbers]


def test_a_recording_does_not_change_what_is_kept_between_calls():
    count = torch.zeros(())

    def function(x: Tensor) -> Tensor:
        count.add_(1)
        return x

    programmed(function, calls=AFTER + 3)
    assert count == AFTER + 3


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.func.hessian(lambda y: (y**3).sum())(x).diagonal(),
        lambda x: (6 * x).reshape(2, 2).t_().t_().reshape(4),
    ],
    ids=["forward mode", "shape in place"],
)
def test_it_is_recorded(function):
    calls: list[int] = []

    def counting(x: Tensor) -> Tensor:
        calls.append(1)
        return function(x)

    play = programmed(counting)
    calls.clear()
    assert torch.equal(play(torch.tensor([1.0, 2.0, -3.0, 0.5])), torch.tensor([6.0, 12.0, -18.0, 3.0])) and not calls


def test_a_derivative_that_torch_takes_otherwise_while_recording_is_not_recorded():
    """x.prod() at powers of two, where both formulas are exact, then elsewhere."""

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(x.prod(), x)[0]

    program = Program(lambda structure, step, meta_steps, tensors: [gradient(tensors[0])])
    for number in range(AFTER + 3):
        program((), 0, 1, [2.0 ** torch.tensor([number % 5, 1, 2, -number % 3])])
    for number in range(50):
        assert torch.equal(program((), 0, 1, [near(number)])[0], gradient(near(number)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_that_changes_is_called(kind):
    engine = engine_of(kind)
    theta, tasks, metric = engine.initial_theta(), tasks_of("mlp", 1), Scaled(1)
    plain = engine.evaluate(theta, tasks, {"loss": cross_entropy})["loss"]
    for number in range(AFTER + 3):
        metric.by = 2.0**number
        assert torch.equal(engine.evaluate(theta, tasks, {"loss": metric})["loss"], plain * 2.0**number)
