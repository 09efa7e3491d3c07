"""A computation recorded once as the list of its tensor operations, then played back, compiled, or captured.

Finding that list (Python, autograd, vmap) takes longer than many of the operations themselves. Playing it back runs the
same ones in the same order, so the results are the same to the bit; compiling it fuses them, so that they differ in
rounding; capturing it as a CUDA graph launches all of them at once.

Nothing in a recording can depend on numbers: whatever takes them out of torch (`.numpy()`, `.tolist()`, `.item()`, an
array, a branch on a value, a pointer) ends it, and the computation goes on being called as it stands. Before a
recording counts, it has repeated two tasks to the bit.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from metadist.core.errors import InputError
from metadist.engine.recording import Recording, aten, geometry, origin, prune, record
from metadist.learners import Context

AFTER = 16  # calls with the same shapes before recording, which takes as long as up to twenty of them
CHECKS = 2  # calls of other results that a recording must repeat before it counts
LONGEST_S, LONGEST_CALLS = 30.0, 15  # to record, the longer of both: half of what makes a worker look hung
SHAPES, KNOWN = 8, 256  # different shapes recorded, and counted, at most
TOLERANCE = 1e-2  # of a compiled result, relative to its largest element, in float32; 1e-8 in float64
SHORT = {
    aten.add.Tensor: torch.add, aten.bmm.default: torch.bmm, aten.cat.default: torch.cat, aten.div.Tensor: torch.div,
    aten.expand.default: torch.Tensor.expand, aten.mean.dim: torch.mean, aten.mm.default: torch.mm,
    aten.mul.Scalar: torch.mul, aten.mul.Tensor: torch.mul, aten.neg.default: torch.neg,
    aten.permute.default: torch.permute, aten.relu.default: torch.relu, aten.sub.Tensor: torch.sub,
    aten.sum.dim_IntList: torch.sum, aten.t.default: torch.t, aten.transpose.int: torch.transpose,
    aten.view.default: torch.Tensor.view,
}  # fmt: skip
"""Operations by another name, whose arguments torch reads in a third of the time."""
Player = Callable[..., Sequence[Tensor]]
Given = tuple[Any, int, int, Sequence[Tensor]]
"""What a program is called with: structure, step, meta_steps, tensors."""


class Watched(Context):
    """A context that notes in `read` when the meta-step is read: what is then computed holds for that step only."""

    read: set[str]

    @classmethod
    def by(cls, read: set[str], *fields: Any) -> "Watched":
        context = cls(*fields)
        context.read = read
        return context

    def _replace(self, **changes: Any) -> "Watched":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Watched.by(self.read, *Context(*tuple.__iter__(self))._replace(**changes))

    @property
    def step(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.read.add("step")
        return tuple.__getitem__(self, 0)

    @property
    def meta_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.read.add("meta_steps")
        return tuple.__getitem__(self, 1)

    def __iter__(self) -> Any:
        return iter((self.step, self.meta_steps, self.draws, self.ways, self.phase))

    def __getitem__(self, place: Any) -> Any:
        return tuple(self)[place]


@dataclass
class _Record:
    """What is known about one set of shapes: how often it came, its player, how often that was found right, and, until
    that was often enough, the results it was last found right at."""

    calls: int = 0
    play: Player | None = None
    checked: int = 0
    last: list[Tensor] | None = None


class Program:
    """`function(structure, step, meta_steps, tensors) -> tensors` as it stands, until it is worth playing back.

    `compiled`: compile it at the first call. `captured`: play it back as a CUDA graph. `read`: what of the meta-step
    the function read; it is to note that there, see `Watched`.
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensor]], compiled: bool = False, captured: bool = False
    ) -> None:
        self._function = function
        self._compiled, self._captured = compiled, captured
        self._records: dict[Any, _Record] = {}
        self.read: set[str] = set()

    def __call__(self, structure: Any, step: int, meta_steps: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """`structure` is handed to the function as it is; with the tensors' shapes it tells recordings apart."""
        key = structure, *((tensor.shape, tensor.dtype) for tensor in tensors)
        record = self._records.get(key)
        if record is None:
            record = _Record()
            if len(self._records) < KNOWN:
                self._records[key] = record
        given = structure, step, meta_steps, tensors
        if self._compiled:
            return self._run_compiled(record, given)
        record.calls += 1
        if record.play is not None and record.checked >= CHECKS:
            return self._play(record.play, given)
        began = time.monotonic()
        result = self._function(*given)
        if record.calls == AFTER and sum(known.play is not None for known in self._records.values()) < SHAPES:
            record.play = self._player(given, max(LONGEST_S, LONGEST_CALLS * (time.monotonic() - began)))
        if record.play is not None:
            self._check(record, result, tensors)
        return result

    def operations(self, structure: Any, step: int, meta_steps: int, tensors: Sequence[Tensor]) -> list[Node]:
        """The operations that a call runs, each with what it gives as `meta["val"]`: tensors without memory."""
        recording = record(
            lambda *given: self._function(structure, step, meta_steps, given), *tensors, without_memory=True
        )
        return list(recording.graph.nodes)

    def _check(self, record: _Record, expected: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Count a recording that repeats `expected` to the bit, where that is not what it was last; else drop it."""
        assert record.play is not None
        if record.last is not None and all(map(torch.equal, record.last, expected)):
            return
        record.checked, record.last = record.checked + 1, [each.clone() for each in expected]
        try:
            same = all(map(torch.equal, expected, _run(record.play, tensors)))
        except Exception:  # noqa: BLE001 - what it recorded was not what it should be
            same = False
        if not same:
            record.play = None
        if record.play is None or record.checked >= CHECKS:
            record.last = None  # results are as large as theta

    def _record(self, given: Given, longest_s: float) -> Recording | None:
        """The operations; None where they are not the same for every step."""
        self.read.clear()
        *context, tensors = given
        recording = record(lambda *recorded: self._function(*context, recorded), *tensors, longest_s=longest_s)
        return None if self.read else recording

    def _player(self, given: Given, longest_s: float) -> Player | None:
        """None where there is nothing to play back: then the function itself goes on being called, to the same bits."""
        try:
            recording = self._record(given, longest_s)
        except Exception:  # noqa: BLE001 - whatever code says that cannot have the numbers; it goes on being called
            return None
        if recording is None:
            return None
        play = shortened(recording)
        if not self._captured:
            return play
        try:
            return capture(play, given[-1])
        except RuntimeError as error:
            raise InputError(
                f"engine.cuda_graphs=true cannot capture this ({_first_line(error)}): leave it out"
            ) from error

    def _play(self, play: Player, given: Given) -> Sequence[Tensor]:
        """Where it fails (a label out of bounds, a singular matrix) the function says more, or goes another way."""
        try:
            return _run(play, given[-1])
        except Exception:  # noqa: BLE001 - what it is, the function's own call tells
            return self._function(*given)

    def _run_compiled(self, record: _Record, given: Given) -> Sequence[Tensor]:
        if record.play is None:
            record.play = self._compile(*given)
        result = self._play(record.play, given)
        if record.checked < CHECKS and not (record.last and all(map(torch.equal, record.last, result))):
            checked, record.last = self._function(*given), [each.clone() for each in result]
            record.checked += all(bool(expected.isfinite().all()) for expected in checked)
            for found, expected in zip(result, checked, strict=True):
                limit = (1e-8 if found.dtype == torch.float64 else TOLERANCE) * float(expected.abs().max())
                if bool(expected.isfinite().all()) and not float((found - expected).abs().max()) <= limit:
                    raise InputError(
                        "engine.compile=true gives other numbers than the computation itself, beyond rounding: leave "
                        "it out for this model, learner and loss"
                    )
            if record.checked >= CHECKS:
                record.last = None
        return result

    def _compile(self, *given: Any) -> Player:
        try:
            recording = self._record(given, LONGEST_S)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"engine.compile=true cannot record this computation ({_first_line(error)}): something in the model, "
                "loss or learner leaves torch (numpy, lists, a branch on values) or draws numbers; take it out of there"
            ) from error
        if recording is None:
            raise InputError(
                "engine.compile=true: the learner depends on the meta-step, so there is no one computation to compile"
            )
        from torch._dynamo.exc import BackendCompilerFailed  # takes a second to import
        from torch._inductor import config

        if hasattr(config, "deterministic"):  # not in older versions, which ask torch itself
            config.deterministic = torch.are_deterministic_algorithms_enabled()
        from_c = all(tensor.device.type == "cpu" for tensor in given[-1])  # what calls the kernels; on GPUs not tried
        compiled = torch.compile(
            recording.function().forward, fullgraph=True, dynamic=False, options={"cpp_wrapper": from_c}
        )  # not through three calls of nn.Module
        try:
            _run(compiled, given[-1])
        except BackendCompilerFailed as error:
            raise InputError(
                f"engine.compile=true: torch could not compile ({_first_line(error)}); it needs a C++ compiler on "
                "every worker (g++), and a CUDA toolkit's Triton on GPUs"
            ) from error
        return compiled


def shortened(recording: Recording) -> Player:
    """What computes the same bits as the recording, with less between its operations: without those that only copy
    (`cat` of one tensor, times 1), and through torch's own functions. Of small tensors that is a fifth of the time."""
    graph = recording.graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    changed = {origin(given) for node in nodes if _writes(node) for given in node.all_input_nodes}
    for node in nodes:
        copied = _copied(node)
        if copied is not None and not {node, origin(copied)} & changed:
            node.replace_all_uses_with(copied)
    prune(graph)
    for node in graph.nodes:
        node.target = SHORT.get(node.target, node.target)
    return recording.function().forward


def _writes(node: Node) -> bool:
    """Whether it may change what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.is_mutable


def _copied(node: Node) -> Any:
    """The node whose numbers this one only copies, into memory that lies the same; None where it does more."""
    arguments: Any = node.args
    source: Any = None
    if node.target is aten.cat.default and len(arguments[0]) == 1:
        source = arguments[0][0]
    elif node.target in (aten.mul.Scalar, aten.mul.Tensor) and arguments[1] in (1, 1.0):
        source = arguments[0]
    if source is None or geometry(source)[3].is_complex:  # of which infinity times 1 is not what it was
        return None
    return source if geometry(node) == geometry(source) else None


def capture(play: Player, tensors: Sequence[Tensor]) -> Player:
    """`play` as a CUDA graph: arguments are copied to fixed places, everything is launched at once."""
    places = [tensor.clone() for tensor in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):  # lets libraries choose kernels and allocate before the capture
            play(*places)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        results = play(*places)

    def replay(*given: Tensor) -> list[Tensor]:
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return [result.clone() for result in results]

    return replay


def _run(play: Player, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Inference mode spares each operation its bookkeeping; what leaves it is copied, to be like any other tensor."""
    with torch.inference_mode():
        results = play(*tensors)
    return [result.clone() for result in results]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
