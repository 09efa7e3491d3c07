"""A computation recorded once as the list of its tensor operations, then played back, compiled, or captured.

Finding that list (Python, autograd, vmap) takes longer than many of the operations themselves. Playing it back runs the
same ones in the same order, so the results are the same to the bit; compiling it fuses them, so that they differ in
rounding; capturing it as a CUDA graph launches all of them at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from metadist.errors import InputError
from metadist.learners import Context

AFTER = 16  # calls with the same shapes before recording, which takes as long as some hundred of them
SHAPES, KNOWN = 8, 256  # different shapes recorded, and counted, at most
aten = torch.ops.aten
VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.transpose.int, aten.t.default,
    aten.permute.default, aten.squeeze.dim, aten.unsqueeze.default, aten.detach.default, aten.alias.default,
}  # fmt: skip
Player = Callable[..., Sequence[Tensor]]


class Watched(Context):
    """A context that notices when the meta-step is read: what is then computed holds for that step only."""

    __slots__ = ()
    read: list[str] = []

    @property
    def step(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.read.append("step")
        return tuple.__getitem__(self, 0)

    @property
    def meta_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.read.append("meta_steps")
        return tuple.__getitem__(self, 1)

    def __iter__(self) -> Any:
        return iter((self.step, self.meta_steps, self.draws, self.ways, self.phase))

    def __getitem__(self, place: Any) -> Any:
        return tuple(self)[place]


@dataclass
class _Record:
    """What is known about one set of shapes."""

    calls: int = 0
    play: Player | None = None


class Program:
    """`function(context numbers, *tensors) -> tensors` as it stands, until it is worth playing back.

    `compiled`: compile it at the first call, and never run it uncompiled. `captured`: play it back as a CUDA graph.
    """

    def __init__(
        self, function: Callable[..., Sequence[Tensor]], compiled: bool = False, captured: bool = False
    ) -> None:
        self._function = function
        self._compiled, self._captured = compiled, captured
        self._records: dict[Any, _Record] = {}

    def __call__(self, structure: Any, step: int, meta_steps: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """`structure` is handed to the function as it is; with the tensors' shapes it tells recordings apart."""
        key = structure, *((tensor.shape, tensor.dtype) for tensor in tensors)
        record = self._records.get(key) or _Record()
        if len(self._records) < KNOWN:
            self._records[key] = record
        if record.play is not None:
            return _run(record.play, tensors)
        record.calls += 1
        if self._compiled:
            record.play = self._compile(structure, step, meta_steps, tensors)
            return _run(record.play, tensors)
        result = self._function(structure, step, meta_steps, tensors)
        if record.calls == AFTER and sum(known.play is not None for known in self._records.values()) < SHAPES:
            record.play = self._playback(structure, step, meta_steps, tensors, result)
        return result

    def _record(self, structure: Any, step: int, meta_steps: int, tensors: Sequence[Tensor]) -> GraphModule | None:
        """The operations; None where they are not the same for every step or every call."""
        Watched.read.clear()
        graph = record(self._function, structure, step, meta_steps, tensors)
        return None if Watched.read else graph

    def _playback(
        self, structure: Any, step: int, meta_steps: int, tensors: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> Player | None:
        """A player that has repeated `expected` to the bit, or None: then the function itself goes on being called."""
        try:
            play: Player | None = self._record(structure, step, meta_steps, tensors)
        except Exception:  # it branches on values or leaves torch: it has just been computed, and can be again
            return None
        if play is None:
            return None
        if self._captured:
            play = capture(play, tensors)
        return play if all(map(torch.equal, expected, _run(play, tensors))) else None

    def _compile(self, structure: Any, step: int, meta_steps: int, tensors: Sequence[Tensor]) -> Player:
        try:
            graph = self._record(structure, step, meta_steps, tensors)
        except RuntimeError as error:
            raise InputError(f"engine.compile=true cannot record this computation ({_first_line(error)})") from error
        if graph is None:
            raise InputError(
                "engine.compile=true: the learner depends on the meta-step, so there is no one computation to compile"
            )
        from torch._dynamo.exc import BackendCompilerFailed  # takes a second to import

        compiled = torch.compile(graph, fullgraph=True, dynamic=False)
        try:
            _run(compiled, tensors)
        except BackendCompilerFailed as error:
            raise InputError(
                f"engine.compile=true: torch could not compile ({_first_line(error)}); it needs a C++ compiler on "
                "every worker (g++), and a CUDA toolkit's Triton on GPUs"
            ) from error
        return compiled


def record(
    function: Callable[..., Sequence[Tensor]], structure: Any, step: int, meta_steps: int, tensors: Sequence[Tensor]
) -> GraphModule:
    """The tensor operations that a call of `function` runs, those that its results need."""
    graph = make_fx(lambda *given: tuple(function(structure, step, meta_steps, given)))(*tensors)
    for node in graph.graph.nodes:
        if node.op == "call_function" and _differs(node):
            raise RuntimeError(f"{node.target} has a result of another size, or other numbers, at every call")
    for node in graph.graph.nodes:
        seen = node
        while seen.op == "call_function" and seen.target in VIEWS:
            seen = seen.args[0]
            if _geometry(seen) == _geometry(node):  # a view of what it is already: a third of what vmap does
                node.replace_all_uses_with(seen)
                break
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _differs(node: Any) -> bool:
    """Whether an operation draws numbers, or its result's size depends on values."""
    tags = getattr(node.target, "tags", ())
    if node.target is aten.index.Tensor:
        return any(index is not None and index.meta["val"].dtype == torch.bool for index in node.args[1])
    return torch.Tag.nondeterministic_seeded in tags or torch.Tag.dynamic_output_shape in tags


def _geometry(node: Any) -> Any:
    value = node.meta.get("val")
    return (value.shape, value.stride(), value.storage_offset()) if isinstance(value, Tensor) else node


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
