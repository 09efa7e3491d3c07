"""The list of tensor operations that a call of a function runs, found by running it once.

Its tensors are then wrapped: a wrapper has a shape and a place in the list, and no memory of its own. So nothing in the
list can depend on numbers: whatever takes them out of torch (`.numpy()`, `.tolist()`, `.item()`, an array, a branch on
a value, a pointer, a mask) is an error, also where the function goes on without. Torch's `make_fx` with fake tensors
finds the same list, but imports torch's compiler (80 MB, over a second), takes two to four times as long, and its
strides are not always those of the operations themselves.
"""

import operator
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.transpose.int, aten.t.default,
    aten.permute.default, aten.squeeze.dim, aten.unsqueeze.default, aten.detach.default, aten.alias.default,
}  # fmt: skip
OF_NUMBERS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
UNTAGGED = {aten._pack_padded_sequence.default}  # as long as the lengths that it is given say
DERIVED_OTHERWISE = {
    aten.prod.default, aten.prod.dim_int, aten.cumprod.default, aten._linalg_det.default, aten._linalg_slogdet.default,
}  # fmt: skip
"""Torch takes another formula for their derivatives where tensors are wrapped: equal to rounding, and so by chance."""
METADATA = {
    aten.t_.default, aten.transpose_.default, aten.squeeze_.default, aten.squeeze_.dim, aten.squeeze_.dims,
    aten.unsqueeze_.default,
}  # fmt: skip
"""What changes a tensor's shape in place, and nothing else."""


class RecordedTensor(Tensor):
    """A tensor of a recording: what its operations ran on, and the node that stands for it."""

    value: Tensor
    node: Node
    recorder: "_Recorder"

    @staticmethod
    def of(value: Tensor, node: Node, recorder: "_Recorder") -> "RecordedTensor":
        recorded: Any = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            RecordedTensor,
            value.shape,
            value.stride(),
            value.storage_offset(),
            dtype=value.dtype,
            device=recorder.device or value.device,
        )
        torch._C._set_throw_on_mutable_data_ptr(recorded)  # pyright: ignore[reportAttributeAccessIssue]
        recorded.value, recorded.node, recorded.recorder = value, node, recorder
        return recorded

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of a tensor that the model, loss or learner kept: after the recording it is like any other."""
        del types
        for recorded in filter(_is_recorded, tree_leaves((args, kwargs))):
            recorded.recorder.refuse_while_active(f"{func} was run where it cannot be recorded, as in another thread")
        return func(*tree_map_only(RecordedTensor, _value, args), **tree_map_only(RecordedTensor, _value, kwargs or {}))


def _of_numbers(name: str) -> Any:
    """A method that takes numbers out of torch: none while the tensor is recorded."""

    def method(self: RecordedTensor, *args: Any, **kwargs: Any) -> Any:
        self.recorder.refuse_while_active(f"{name} depends on the numbers in a tensor")
        return getattr(self.value, name)(*args, **kwargs)

    return method


for _name in (
    "numpy", "tolist", "data_ptr", "storage", "untyped_storage", "__array__", "__dlpack__", "__deepcopy__",
    "__reduce_ex__", "__repr__", "__format__",
):  # fmt: skip
    setattr(RecordedTensor, _name, _of_numbers(_name))


def _set_data(self: RecordedTensor, data: Tensor) -> None:
    self.recorder.refuse_while_active("a tensor was put into another (x.data = y)")
    self.value.data = _value(data) if isinstance(data, RecordedTensor) else data


RecordedTensor.data = property(Tensor.data.__get__, _set_data)  # pyright: ignore[reportAttributeAccessIssue]


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
        self._ends_at, self.device = ends_at, device
        self._known: dict[int, tuple[Tensor, Node]] = {}
        self.active, self.refused, self.reshapes = True, "", False

    def given(self, number: int, value: Tensor) -> RecordedTensor:
        return self._wrapped(self._value(value), self.graph.placeholder(f"given_{number}"))

    def node(self, tensor: Tensor) -> Node:
        """The tensor's; one from outside the recording, such as a buffer of a module, is a constant of it."""
        if isinstance(tensor, RecordedTensor) and tensor.recorder is self:
            return tensor.node
        if isinstance(tensor, RecordedTensor):
            self.refuse("a tensor was kept from an earlier recording")
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
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if func in UNTAGGED or any(tag in func.tags for tag in OF_NUMBERS) and not _takes_places(func, args):
            self.refuse(f"{func} depends on the numbers in a tensor")
        written = _written(func, args, kwargs)
        if self.device is None:
            self._refuse_what_differs(func, args, written)
        if func is aten.lift_fresh.default:  # of a tensor made of Python's numbers, anew in every call
            func = aten.clone.default
        call = self.graph.call_function(func, *tree_map_only(Tensor, self.node, (args, kwargs)))
        values, options = tree_map_only(Tensor, self._value, (args, kwargs))
        if self.device and ("device" in options or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(values))):
            options["device"] = "meta"
        results = func(*values, **options)
        if func in METADATA:
            self.reshapes = True
            with torch._C._DisableTorchDispatch():  # pyright: ignore[reportAttributeAccessIssue]
                func(*args, **kwargs)
        if any(_geometry(tensor) != _geometry(self._value(tensor)) for tensor in written):
            self.refuse(f"{func} gives a tensor another shape")
        if _returns_written(func):
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        return self._wrapped(results, call)

    def _refuse_what_differs(self, func: Any, args: Any, written: Sequence[Tensor]) -> None:
        """What would not be the same when it is played back."""
        if func.namespace not in ("aten", "prims"):
            self.refuse(f"{func} may have results of any shape")
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.refuse(f"{func} has other numbers at every call")
        if func in DERIVED_OTHERWISE and args[0].requires_grad:
            self.refuse(f"{func} has another derivative where it is recorded")
        if any(origin(self.node(tensor)).op != "call_function" for tensor in written):
            self.refuse(f"{func} changes a tensor that is not of this call, or that the call is given")

    def refuse(self, why: str) -> None:
        """Raise RuntimeError, and again when the recording ends, where the function went on without."""
        self.refused = self.refused or why
        raise RuntimeError(why)

    def refuse_while_active(self, why: str) -> None:
        if self.active:
            self.refuse(why)

    def _wrapped(self, results: Any, node: Node) -> Any:
        self._noted(node, results)
        if isinstance(results, Tensor):
            return self._recorded(results, node)
        if isinstance(results, tuple | list):
            each = (
                self._wrapped(result, self.graph.call_function(operator.getitem, (node, place)))
                for place, result in enumerate(results)
            )
            return type(results)(each)
        return results

    def _value(self, tensor: Tensor) -> Tensor:
        value = tensor.value if isinstance(tensor, RecordedTensor) else tensor
        return value.to("meta") if self.device else value

    def _recorded(self, value: Tensor, node: Node) -> RecordedTensor:
        if value.layout != torch.strided:
            self.refuse("a tensor is sparse")
        if value._is_zerotensor():  # no memory, which forward mode begins with: here it has to have some
            value = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        return RecordedTensor.of(value, node, self)

    def _noted(self, node: Node, value: Any) -> Node:
        if isinstance(value, Tensor):
            node.meta["geometry"] = _geometry(value)
        if self.device:
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
    try:
        with recorder:
            results = function(*given)
    finally:
        recorder.active = False
    if recorder.refused:
        raise RuntimeError(recorder.refused)
    graph = recorder.graph
    graph.output(tuple(map(recorder.node, results)))
    for node in () if recorder.reshapes else graph.nodes:
        seen = node
        while seen.op == "call_function" and seen.target in VIEWS:
            seen = seen.args[0]
            if geometry(seen) == geometry(node):  # a view of what it is already: a third of what vmap does
                node.replace_all_uses_with(seen)
                break
    prune(graph)
    return Recording(graph, recorder.constants)


def prune(graph: Graph) -> None:
    """Take out what no result needs, parts of convolutions' derivatives included, and which does nothing but give one:
    a check that may raise stays."""
    graph.eliminate_dead_code(lambda node: node.is_impure() or not _gives(node))
    for node in graph.nodes:
        if node.target is aten.convolution_backward.default:
            _narrow(node)


def _narrow(node: Node) -> None:
    """Leave out of a convolution's derivative what nobody takes: that of the images, or of the weights and biases."""
    arguments: Any = node.args
    *given, (images, weights, biases) = arguments
    takers: list[Any] = [user for user in node.users if user.target is operator.getitem]
    if len(takers) < len(node.users):
        return
    taken = {taker.args[1] for taker in takers}
    by_layer = bool(taken & {1, 2})
    node.args = (*given, [images and 0 in taken, weights and by_layer, biases and by_layer])


def _gives(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or bool(schema.returns)


def geometry(node: Any) -> Any:
    """Shape, strides, offset and dtype of what a node stands for; the node itself where it is no tensor."""
    return node.meta.get("geometry", node)


def _value(recorded: RecordedTensor) -> Tensor:
    return recorded.value


def _is_recorded(value: Any) -> bool:
    return isinstance(value, RecordedTensor)


def _geometry(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _takes_places(func: Any, args: Any) -> bool:
    """Whether it is indexing by place, whose shape, other than that of a mask's, is known."""
    masks = (torch.bool, torch.uint8)
    return func is aten.index.Tensor and not any(index.dtype in masks for index in args[1] if index is not None)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Of what it is given, all that it changes."""
    found = [args[place] if place < len(args) else kwargs.get(name) for place, name in _written_arguments(func)]
    return [tensor for tensor in tree_leaves(found) if isinstance(tensor, Tensor)]


@cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [(place, each.name) for place, each in arguments if each.alias_info and each.alias_info.is_write]


@cache
def _returns_written(func: Any) -> bool:
    """Whether what it returns is what it changed."""
    returns = func._schema.returns
    return bool(returns) and all(each.alias_info is not None and each.alias_info.is_write for each in returns)


def origin(node: Any) -> Any:
    """Whose memory it has: what a chain of views, or of changes in place, begins with."""
    while node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        aliased = schema is not None and schema.returns and schema.returns[0].alias_info is not None
        if not (aliased or node.target in VIEWS or node.target is operator.getitem):
            break
        node = node.all_input_nodes[0]
    return node
