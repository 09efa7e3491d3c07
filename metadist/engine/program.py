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
SHAPES = 8  # different shapes recorded at most
Player = Callable[..., Sequence[Tensor]]


class Watched(Context):
    """A context that notices when the meta-step is read: what is then computed holds for that step only."""

    __slots__ = ()
    read: list[str] = []

    @property
    def step(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.read.append("step")
        return self[0]

    @property
    def meta_steps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.read.append("meta_steps")
        return self[1]

    def __iter__(self) -> Any:
        return iter((self.step, self.meta_steps, self.draws))


@dataclass
class _Record:
    """What is known about one set of shapes."""

    calls: int = 0
    play: Player | None = None
    given_up: bool = False


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
        record = self._records.setdefault(key, _Record())
        if record.play is not None:
            with torch.no_grad():
                return record.play(*tensors)
        record.calls += 1
        if self._compiled:
            record.play = self._compile(structure, step, meta_steps, tensors)
            with torch.no_grad():
                return record.play(*tensors)
        result = self._function(structure, step, meta_steps, tensors)
        if record.calls == AFTER and len(self._records) <= SHAPES:
            record.play = self._playback(structure, step, meta_steps, tensors, result)
        return result

    def _record(self, structure: Any, step: int, meta_steps: int, tensors: Sequence[Tensor]) -> GraphModule | None:
        """The operations; None where they are not the same for every step or every call."""
        Watched.read.clear()
        graph = record(self._function, structure, step, meta_steps, tensors)
        operations = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        random = any(torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ()) for operation in operations)
        return None if random or Watched.read else graph

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
        with torch.no_grad():
            repeated = play(*tensors)
        return play if all(map(torch.equal, expected, repeated)) else None

    def _compile(self, structure: Any, step: int, meta_steps: int, tensors: Sequence[Tensor]) -> Player:
        try:
            graph = self._record(structure, step, meta_steps, tensors)
        except RuntimeError as error:
            raise InputError(f"engine.compile=true cannot record this computation ({_first_line(error)})") from error
        if graph is None:
            raise InputError(
                "engine.compile=true: the learner depends on the meta-step or draws random numbers outside its key"
            )
        from torch._dynamo.exc import BackendCompilerFailed  # takes a second to import

        compiled = torch.compile(graph, fullgraph=True, dynamic=False)
        try:
            with torch.no_grad():
                compiled(*tensors)
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
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
