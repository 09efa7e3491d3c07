"""What to change where torch runs out of memory, or refuses to differentiate a model twice: one sentence each."""

import re

from metadist.engine.method import Kind, Method
from metadist.learners import EvolutionStrategies, Learner
from metadist.models.model import layer_of

LACKS_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")
LEAVES_TORCH = re.compile(
    r"Can't call numpy\(\)|Cannot access data pointer|calling \.item\(\)|element 0 of tensors does not require grad"
)

CHANGED_WEIGHT = (
    "the model changed its weight {!r} in forward, which no derivative sees: leave theta as it is there, and compute "
    "what should be used in its place anew"
)
CHANGED_EXAMPLES = (
    "the model, loss or learner changes a task's examples in place (such as x += 1), so that every inner step would "
    "see others: make a new tensor (x = x + 1)"
)


def remedy(error: BaseException, learner: Learner, method: Method, num_tasks: int) -> str | None:
    """For an error that computing some tasks at once raised: what it means for this learner; None for any other."""
    if is_out_of_memory(error):
        return out_of_memory(learner, method, num_tasks)
    problem = _problem(str(error), learner, method.kind)
    return problem and f"{layer_of(error, learner.model.module)} {problem}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python failed to allocate."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)


def out_of_memory(learner: Learner, method: Method, num_tasks: int) -> str:
    """What ran out, and the settings to change, the cheapest remedy first."""
    remedies = []
    if method.kind == "vmap" and num_tasks > 1:
        remedies.append(f"engine.chunk_size={num_tasks // 2} (now {num_tasks} tasks at once) or engine.kind=loop")
    if method.differentiation == "unroll" and learner.inner_steps > 1 and not learner.first_order:
        steps = learner.inner_steps
        remedies.append(f"engine.differentiation=remat (it keeps one inner step's activations, not {steps})")
    if method.differentiation == "remat" and method.spacing == 1 and learner.inner_steps > 3:
        remedies.append("engine.keep=sqrt (it keeps fewer fast weights)")
    if not learner.first_order:
        remedies.append("learner.first_order=true")
    remedies.append("fewer task.queries or task.shots, or a smaller model")
    return f"memory ran out while computing {num_tasks} task{'s' * (num_tasks > 1)}: set {', or '.join(remedies)}"


def _problem(text: str, learner: Learner, kind: Kind) -> str | None:
    """What a layer does that an error's text complains of, and what to do about it."""
    if found := LACKS_DERIVATIVE.search(text):
        operation = found[1].strip("_").removesuffix("_backward")
        first = "" if learner.first_order else "set learner.first_order=true, or "
        return f"uses {operation}, of which torch lacks a derivative: {first}write it with other operations"
    if "saved tensor hooks" in text:
        return (
            "computes activations again on the way back (torch.utils.checkpoint), which vmap and torch.func "
            "cannot: set engine.kind=loop and engine.differentiation=remat, or take the checkpointing out"
        )
    if "use_reentrant=True" in text:
        return "uses torch.utils.checkpoint with use_reentrant=True, set it to False"
    if "mutate a captured Tensor" in text or "inplace arithmetic" in text:
        return (
            "changes a weight, a buffer or its input in forward, which tasks would leak through: keep no state between "
            "calls, compute it anew in each (x = x + 1, not x += 1)"
        )
    if "randomness" in text and kind == "vmap":
        return (
            "draws random numbers from a global generator (F.dropout, torch.randn), so that no task could be computed "
            "again: use nn.Dropout, which draws from the task's own key, and let the task's source draw other noise"
        )
    if isinstance(learner, EvolutionStrategies) and LEAVES_TORCH.search(text):
        return _without_derivative(learner)
    return None


def _without_derivative(learner: EvolutionStrategies) -> str:
    """What evolution strategies need where a model or loss has no derivative, or leaves torch."""
    own = 'name a class of your own, learner.name=module:Class, an EvolutionStrategies with engines = ("loop",)'
    if learner.inner_directions:
        return f"leaves torch (numpy, .item(), a branch on values), but is computed with many weights at once: {own}"
    also = f"; where it leaves torch (numpy, .item()), also {own}" if "vmap" in learner.engines else ""
    return f"has no derivative, which inner steps take: set learner.inner_directions=16, which need none{also}"
