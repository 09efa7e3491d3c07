"""What results are judged by: the one metric that decides which weights are best, and on which side it is better."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Better = Literal["higher", "lower"]
BUILT_IN: Mapping[str, Better] = {"accuracy": "higher", "confidence": "higher", "loss": "lower"}
"""The metrics of tasks with labels or values; the first that a task has is its measure."""
_OF_A_SUMMARY = {
    "protocol", "measure", "begun", "baselines", "verdict", "divergence", "diverged_tasks", "figures", "advice",
    "few_tasks", "tasks_of", "online", "resolved", "seconds", "identity", "data_digest", "bit_identical", "ended_by",
    "mlflow_page", "evaluated_step", "evaluated_theta_sha256", "theta_sha256", "meta_steps", "tasks_by_staleness",
    "evaluation_failed", "task",
}  # fmt: skip


class Measure(NamedTuple):
    """The measure of success: a metric's `name`, and whether "higher" or "lower" is `better`.

    Accuracies are fractions, and shown in per cent; all others are shown as they are.

    Example:
        >>> Measure("return", "higher").sign
        1
        >>> Measure("accuracy", "higher").text(0.9416)
        '94.16 %'
    """

    name: str
    better: Better

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> "Measure":
        """That of an evaluation's summary, as results.json has it. Raises ValueError where it says none that there is;
        those written before measures had names are judged by accuracy, or else the loss."""
        if "measure" not in summary:
            return ACCURACY if "accuracy" in summary else LOSS
        return cls.parse(summary["measure"])

    @classmethod
    def parse(cls, saved: Any) -> "Measure":
        """The inverse of `saved`. Raises ValueError for anything else."""
        if not isinstance(saved, Mapping) or saved.get("better") not in ("higher", "lower"):
            raise ValueError(f"{saved!r} is no measure with a name and what is better")
        return cls(str(saved.get("name")), saved["better"])

    @staticmethod
    def is_taken(name: str) -> bool:
        """Whether results say something else under that name than a metric."""
        return name in _OF_A_SUMMARY or name.endswith(("_ci95", "_before")) or "/" in name

    def saved(self) -> dict[str, str]:
        """As plain values."""
        return dict(self._asdict())

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1: times this, higher is better."""
        return 1 if self.better == "higher" else -1

    @property
    def scale(self) -> float:
        """What values are multiplied with where they are shown."""
        return 100.0 if self.name == "accuracy" else 1.0

    @property
    def digits(self) -> int:
        """Decimal places that are shown."""
        return 2 if self.name == "accuracy" else 4

    def text(self, mean: float, ci95: float = math.nan) -> str:
        """A value, with the half-width of its 95 % interval where there is one."""
        unit = " %" if self.name == "accuracy" else ""
        half = "" if math.isnan(ci95) else f" ± {self.scale * ci95:.{self.digits}f}"
        return f"{self.scale * mean:.{self.digits}f}{unit}{half}"

    def difference(self, by: float, ci95: float) -> str:
        """How far two values lie apart, with the half-width of its interval and the unit."""
        unit = " percentage points" if self.name == "accuracy" else ""
        return f"{self.scale * abs(by):.{self.digits}f} ± {self.scale * ci95:.{self.digits}f}{unit}"


ACCURACY, LOSS = Measure("accuracy", "higher"), Measure("loss", "lower")
