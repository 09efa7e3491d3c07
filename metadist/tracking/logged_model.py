"""The code of a logged model: MLflow copies this file beside the weights, and runs it where the model is loaded.

    mlflow.pyfunc.load_model("models:/m-...").predict({"support_x": x, "support_y": y, "query_x": new})

Nothing but metadist is imported, and no pickle is read. It checks what it is given itself (see
`metadist.tracking.models`), so that each error names the field that is wrong.
"""

import threading
from functools import lru_cache
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

import metadist

MOST_STEPS = 1000


def refused(text: str) -> MlflowException:
    """What an HTTP server answers with 400."""
    return MlflowException.invalid_parameter_value(text)


class FewShotModel(PythonModel):
    """Adapts to the labelled examples of a request, and predicts its others."""

    def load_context(self, context: Any) -> None:
        """Loads the weights, so that what is wrong with them is said at the start."""
        folder = context.artifacts["checkpoint"]
        self._learner = lru_cache(maxsize=8)(lambda **changes: metadist.load(folder, **changes))
        self._learner()
        self._computing = threading.Lock()  # two threads in one model would see each other's weights

    # the input is a mapping from names to arrays or nested lists, for which MLflow has no annotation; it warns of none,
    # and of others than this one
    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None
    ):
        """{"labels": [n], "probabilities": [n, ways]} of the query examples, the columns by sorted label; in regression
        {"values": [n, d]}."""
        del context
        with self._computing:
            learner = self._changed(params or {})
            given = {name: array(model_input, name, *field) for name, field in learner.fields.items()}
            support_x, support_y, query_x = (parts(given, each) for each in ("support_x", "support_y", "query_x"))
            if len({len(each) for each in (*support_x, *support_y)}) > 1:
                raise refused(f"support_y has {len(support_y[0])} entries and support_x {len(support_x[0])}")
            try:
                adapted = learner.adapt(support_x, support_y)
            except metadist.InputError as error:
                raise refused(f"support_y: {error}") from None
            try:
                found = adapted.predict(query_x)
            except metadist.Diverged:
                raise refused("params: adaptation diverged, the outputs are not finite: lower lr or steps") from None
            if adapted.classes is None:
                return {"values": found}
            return {"labels": found, "probabilities": adapted.predict_proba(query_x)}

    def _changed(self, params: dict[str, Any]) -> Any:
        """The learner with another number of inner steps or another rate, as `params` say."""
        own = self._learner().settings
        asked = {"inner_steps": params.get("steps"), "inner_lr": params.get("lr")}
        changes = {name: value for name, value in asked.items() if value is not None and value != own.get(name)}
        if not 0 <= changes.get("inner_steps", 0) <= MOST_STEPS:
            raise refused(f"params: steps is {changes['inner_steps']}, give a number from 0 to {MOST_STEPS}")
        try:
            return self._learner(**changes)
        except metadist.InputError as error:
            raise refused(f"params: {error}") from None


def array(given: Any, name: str, dtype: str, shape: list[int]) -> np.ndarray:
    """The array of that name; an image may come in bytes, whatever its dtype. Raises MlflowException."""
    if not hasattr(given, "keys") or name not in given:
        raise refused(f"{name} is missing: give it as an array of shape {shape}, -1 meaning any number")
    try:
        found = np.asarray(given[name])
    except ValueError:
        raise refused(f"{name} is no array: its rows have unequal lengths") from None
    fits = {"f": "iuf", "i": "iuf", "u": "iuf", "b": "biu"}[np.dtype(dtype).kind]
    if found.dtype.kind not in fits:
        raise refused(f"{name} holds {found.dtype} and must hold {dtype}")
    if found.ndim != len(shape) or not len(found) or list(found.shape[1:]) != shape[1:]:
        raise refused(f"{name} has shape {list(found.shape)} and must have {shape}, -1 meaning any number above 0")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise refused(f"{name} has values that are not finite")
    if np.dtype(dtype).kind != "f" and not np.array_equal(found, np.floor(found)):
        raise refused(f"{name} has values that are no whole numbers")
    return found if found.dtype == np.uint8 else found.astype(dtype)


def parts(given: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, ...]:
    """The arrays `name`, or `name_0`, `name_1`, ..."""
    return tuple(found for key, found in given.items() if key == name or key.startswith(f"{name}_"))


set_model(FewShotModel())
