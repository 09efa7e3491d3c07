"""What to change where torch refuses to differentiate a model twice, in one sentence that names the layer."""

import re

from metadist.learners import Learner
from metadist.models.model import layer_of

SECOND = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")


def remedy(error: BaseException, learner: Learner, kind: str) -> str | None:
    """For an error of torch's own: what it means for this learner under `engine.kind`; None for any other."""
    text, where = str(error), layer_of(error, learner.model.module)
    if found := SECOND.search(text):
        operation = found[1].strip("_").removesuffix("_backward")
        first = "" if learner.first_order else "set learner.first_order=true, or "
        return f"{where} uses {operation}, of which torch lacks a derivative: {first}write it with other operations"
    if "saved tensor hooks" in text:
        return (
            f"{where} computes activations again on the way back (torch.utils.checkpoint), which vmap and torch.func "
            "cannot: set engine.kind=loop and engine.differentiation=remat, or take the checkpointing out"
        )
    if "use_reentrant=True" in text:
        return f"{where} uses torch.utils.checkpoint with use_reentrant=True, set it to False"
    if "mutate a captured Tensor" in text or "inplace arithmetic" in text:
        return (
            f"{where} changes a weight or buffer in forward, which tasks would leak through: keep no state between "
            "calls, compute it anew in each"
        )
    if "randomness" in text and kind == "vmap":
        return f"{where} {DRAWS}"
    return None


DRAWS = (
    "draws random numbers from a global generator (F.dropout, torch.randn), so that no task could be computed again: "
    "use nn.Dropout, which draws from the task's own key, and let the task's source draw other noise"
)
