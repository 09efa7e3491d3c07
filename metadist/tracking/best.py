"""The best validation of a run so far."""

import math
from collections.abc import Mapping

from metadist.core.measure import ACCURACY, LOSS, Measure


class Best:
    """Of the validations offered, the one that is best by the measure of success. Without one, as of a run that does
    not say it, that is the highest accuracy, or else the lowest loss.

    measure, value, ci95: of the best one; `step` is None before the first one.
    """

    def __init__(self, measure: Measure | None = None) -> None:
        self._known = measure
        self.measure, self.value, self.ci95 = measure or LOSS, math.nan, math.nan
        self.step: int | None = None

    def offer(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of one meta-step; those without a validation, or with one that diverged, are passed over."""
        measure = self._known or (ACCURACY if "validation/accuracy" in values else LOSS)
        value = float(values.get(f"validation/{measure.name}", math.nan))
        if values.get("validation/diverged_tasks") or math.isnan(value):
            return
        if self.step is None or measure.sign * value > measure.sign * self.value:
            self.measure, self.value, self.step = measure, value, step
            self.ci95 = float(values.get(f"validation/{measure.name}_ci95", math.nan))
