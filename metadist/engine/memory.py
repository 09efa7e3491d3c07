"""How much memory a chunk takes, before it is computed, and what to change where that is too much."""

from metadist.engine.method import Method
from metadist.learners import Learner


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python failed to allocate."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)


def out_of_memory(learner: Learner, method: Method, num_tasks: int) -> str:
    """One sentence: what ran out, and the setting to change, the cheapest remedy first."""
    remedies = []
    if method.kind == "vmap" and num_tasks > 1:
        remedies.append(f"engine.chunk_size={num_tasks // 2} (now {num_tasks} tasks at once) or engine.kind=loop")
    if method.differentiation == "unroll" and learner.inner_steps > 1 and not learner.first_order:
        steps = learner.inner_steps
        remedies.append(f"engine.differentiation=remat (it keeps one inner step's activations, not {steps})")
    if method.differentiation != "unroll" and method.spacing == 1 and learner.inner_steps > 3:
        remedies.append("engine.keep=sqrt (it keeps fewer fast weights)")
    if not learner.first_order:
        remedies.append("learner.first_order=true")
    remedies.append("fewer task.queries or task.shots, or a smaller model")
    return f"memory ran out while computing {num_tasks} task{'s' * (num_tasks > 1)}: set {', or '.join(remedies)}"
