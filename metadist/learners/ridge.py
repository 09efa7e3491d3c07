"""R2-D2: a ridge regression on learned features takes the place of the inner loop."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.core.task import Examples
from metadist.learners.heads import PRESENT, ClosedForm, classes_present, features, target_columns
from metadist.learners.learner import Context, Fast, Tensors
from metadist.models.losses import never


@dataclass(frozen=True, kw_only=True)
class R2D2(ClosedForm):
    """W = X' (X X' + lambda I)^-1 Y of support features X [n, d + 1] and one-hot labels Y; outputs alpha X_q W + beta.

    Bertinetto et al. 2019, equations 5 and 6 (https://arxiv.org/abs/1805.08136): the Woodbury form, whose system has as
    many unknowns as there are support examples. lambda (as its logarithm), alpha and beta are learned with the
    features; a column of ones gives W its bias. For regression Y are the targets and alpha = 1, beta = 0 to begin with.
    A class without support examples, where labels have gaps, is never predicted.
    """

    initial_lambda: float = 50.0
    initial_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_lambda <= 0:
            raise ValueError(f"initial_lambda={self.initial_lambda} must be above 0")

    def layout(self) -> Tensors:
        theta = super().layout()
        numbers = {"log_lambda": math.log(self.initial_lambda), "scale": self.initial_scale, "shift": 0.0}
        like = next(iter(self.model.parameters.values()))  # a body may have none
        return theta | {f"ridge/{name}": like.new_tensor([x]) for name, x in numbers.items()}

    def begin(self, theta: Tensors, support: Examples, context: Context) -> Fast:
        rows = self._rows(theta, support.inputs)
        targets = target_columns(support, context.ways, rows)
        kernel = rows @ rows.T + theta["ridge/log_lambda"].exp() * torch.eye(len(rows)).to(rows)
        present = {PRESENT: classes_present(support, context.ways)} if context.ways else {}
        return Fast({}, {"ridge": rows.T @ torch.linalg.solve(kernel, targets)} | present)

    def predict(self, theta: Tensors, fast: Fast, inputs: tuple[Tensor, ...]) -> Tensor:
        outputs = theta["ridge/scale"] * (self._rows(theta, inputs) @ fast.state["ridge"]) + theta["ridge/shift"]
        return never(outputs, fast.state[PRESENT]) if PRESENT in fast.state else outputs

    def _rows(self, theta: Tensors, inputs: tuple[Tensor, ...]) -> Tensor:
        """Features [n, d] and a column of ones."""
        return F.pad(features(self.model, theta, inputs), (0, 1), value=1.0)
