"""The list of tensor operations that a call of a function runs, found by running it once.

Its tensors are then wrapped: a wrapper has a shape and a place in the list, and no memory of its own. So nothing in the
list can depend on numbers: whatever takes them out of torch (`.numpy()`, `.tolist()`, `.item()`, an array, a branch on
a value, a pointer, a mask) is an error. Torch's `make_fx` with fake tensors finds the same list, but imports torch's
compiler (80 MB, over a second), takes three to five times as long, and its strides are not always those of the
operations themselves.
"""

import operator
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from metadist.core.errors import InputError

aten = torch.ops.aten
VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.transpose.int, aten.t.default,
    aten.permute.default, aten.squeeze.dim, aten.unsqueeze.default, aten.detach.default, aten.alias.default,
}  # fmt: skip
OF_NUMBERS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class RecordedTensor(Tensor):
    """A tensor of a recording: what its operations ran on, and the node that stands for it."""

    value: Tensor
    node: Node

    @staticmethod
    def of(value: Tensor, node: Node, device: torch.device) -> "RecordedTensor":
        recorded: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            RecordedTensor, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype, device=device
        )
        torch._C._set_throw_on_mutable_data_ptr(recorded)  # pyright: ignore[reportAttributeAccessIssue]
        recorded.value, recorded.node = value, node
        return recorded

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types, args, kwargs
        raise InputError(
            f"the model, loss or learner kept a tensor from one call and gave it to {func} in another: compute it anew"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"RecordedTensor({self.node}, {tuple(self.shape)}, {self.dtype})"


class Recording(NamedTuple):
    """Operations, and the tensors from outside that they read. `meta["geometry"]` of a node is that of its tensor."""

    graph: Graph
    constants: torch.nn.Module

    def function(self) -> GraphModule:
        """What runs them."""
        return GraphModule(self.constants, self.graph)


class Mode(TorchDispatchMode):
    """One for whose sake torch does not import its compiler, to keep that off it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Recorder(Mode):
    """Runs every operation, and puts it into the graph. `device`: that of tensors without memory, where they are to
    have none."""

    def __init__(self, ends_at: float, device: torch.device | None) -> None:
        super().__init__()
        self.graph = Graph()
        self.constants = torch.nn.Module()
        self._ends_at, self._device = ends_at, device
        self._known: dict[int, tuple[Tensor, Node]] = {}

    def given(self, number: int, value: Tensor) -> RecordedTensor:
        return self._wrapped(self._value(value), self.graph.placeholder(f"given_{number}"))

    def node(self, tensor: Tensor) -> Node:
        """The tensor's; one from outside the recording, such as a buffer of a module, is a constant of it."""
        if isinstance(tensor, RecordedTensor):
            return tensor.node
        if id(tensor) not in self._known:
            name = f"constant_{len(self._known)}"
            self.constants.register_buffer(name, tensor)
            node = self._noted(self.graph.create_node("get_attr", name), self._value(tensor))
            self._known[id(tensor)] = tensor, node
        return self._known[id(tensor)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if time.monotonic() > self._ends_at:
            raise TimeoutError("recording takes too long")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{func} has other numbers at every call")
        if any(tag in func.tags for tag in OF_NUMBERS) and not _takes_places(func, args):
            raise RuntimeError(f"{func} depends on the numbers in a tensor")
        if func is aten.lift_fresh.default:  # of a tensor made of Python's numbers, anew in every call
            func = aten.clone.default
        call = self.graph.call_function(func, *tree_map_only(Tensor, self.node, (args, kwargs)))
        values, options = tree_map_only(Tensor, self._value, (args, kwargs))
        if self._device and ("device" in options or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(values))):
            options["device"] = "meta"
        results = func(*values, **options)
        if _changes_first(func):
            if isinstance(args[0], RecordedTensor):
                args[0].node = self._noted(call, args[0].value)
                if torch.Tag.inplace_view in func.tags:  # such as `unsqueeze_`: the wrapper's shape changes as well
                    with no_dispatch():
                        func(*args, **kwargs)
            return args[0]
        return self._wrapped(results, call)

    def _wrapped(self, results: Any, node: Node) -> Any:
        self._noted(node, results)
        if isinstance(results, Tensor):
            return RecordedTensor.of(results, node, self._device or results.device)
        if isinstance(results, tuple | list):
            each = (
                self._wrapped(result, self.graph.call_function(operator.getitem, (node, place)))
                for place, result in enumerate(results)
            )
            return type(results)(each)
        return results

    def _value(self, tensor: Tensor) -> Tensor:
        value = tensor.value if isinstance(tensor, RecordedTensor) else tensor
        return value.to("meta") if self._device else value

    def _noted(self, node: Node, value: Any) -> Node:
        if isinstance(value, Tensor):
            node.meta["geometry"] = value.shape, value.stride(), value.storage_offset(), value.dtype
        if self._device:
            node.meta["val"] = value
        return node


def record(
    function: Callable[..., Sequence[Tensor]],
    *tensors: Tensor,
    longest_s: float = float("inf"),
    without_memory: bool = False,
) -> Recording:
    """The operations that `function(*tensors)` runs, those that its results need. `without_memory`: on tensors of
    torch's device "meta", which are then in `meta["val"]` of the nodes.

    Raises whatever `function` does where it asks for numbers, and TimeoutError after `longest_s` seconds.
    """
    recorder = _Recorder(time.monotonic() + longest_s, tensors[0].device if without_memory else None)
    given = [recorder.given(number, tensor) for number, tensor in enumerate(tensors)]
    with recorder:
        results = function(*given)
    graph = recorder.graph
    graph.output(tuple(map(recorder.node, results)))
    for node in graph.nodes:
        seen = node
        while seen.op == "call_function" and seen.target in VIEWS:
            seen = seen.args[0]
            if geometry(seen) == geometry(node):  # a view of what it is already: a third of what vmap does
                node.replace_all_uses_with(seen)
                break
    graph.eliminate_dead_code()
    return Recording(graph, recorder.constants)


def geometry(node: Any) -> Any:
    """Shape, strides, offset and dtype of what a node stands for; the node itself where it is no tensor."""
    return node.meta.get("geometry", node)


def _takes_places(func: Any, args: Any) -> bool:
    """Whether it is indexing by place, whose shape, other than that of a mask's, is known."""
    masks = (torch.bool, torch.uint8)
    return func is aten.index.Tensor and not any(index.dtype in masks for index in args[1] if index is not None)


def _changes_first(func: Any) -> bool:
    """Whether it changes its first argument and returns it: not so, where results go to an `out`."""
    arguments, returns = func._schema.arguments, func._schema.returns
    if len(returns) != 1 or not arguments:
        return False
    return all(each.alias_info is not None and each.alias_info.is_write for each in (arguments[0], returns[0]))
