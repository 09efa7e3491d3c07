"""The best validation of a run so far."""

import math
from collections.abc import Mapping


class Best:
    """Of the validations offered, the one with the highest `validation/accuracy`, or else the lowest loss.

    value, ci95: of that metric, which is called `metric`; `step` is None before the first one.
    """

    def __init__(self) -> None:
        self.metric, self.value, self.ci95 = "", math.nan, math.nan
        self.step: int | None = None

    def offer(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of one meta-step; those without a validation, or with one that diverged, are passed over."""
        metric = "accuracy" if "validation/accuracy" in values else "loss"
        value = float(values.get(f"validation/{metric}", math.nan))
        if values.get("validation/diverged_tasks") or math.isnan(value):
            return
        if self.step is None or (value > self.value if metric == "accuracy" else value < self.value):
            self.metric, self.value, self.step = metric, value, step
            self.ci95 = float(values.get(f"validation/{metric}_ci95", math.nan))
