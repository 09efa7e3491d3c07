import json
import math

import pytest

from metadist.core.errors import InputError
from metadist.tracking.jsonl import JsonlTracker, read_metrics


def test_numbers_come_back_and_are_there_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.metrics({"train/loss": 0.1 + 0.2, "workers/alive": 2}, step=1)
    assert [row["train/loss"] for row in read_metrics(path)] == [0.1 + 0.2]
    tracker.metrics({"a": math.nan, "b": math.inf, "c": -math.inf}, step=2)
    tracker.finish("FINISHED")
    first, second = read_metrics(path)
    assert first["step"] == 1 and first["workers/alive"] == 2 and first["time"] > 1.7e9
    assert math.isnan(second["a"]) and second["b"] == math.inf and second["c"] == -math.inf


def test_every_line_is_valid_json(tmp_path):
    tracker = JsonlTracker(tmp_path / "m")
    tracker.metrics({"a": math.nan, "b": math.inf}, step=1)
    tracker.finish("FAILED")

    def refuse(name):
        raise AssertionError(name)

    assert json.loads((tmp_path / "m").read_text(), parse_constant=refuse)["a"] == "nan"


def test_a_line_torn_at_any_byte_is_left_out_and_never_glued_to(tmp_path):
    path = tmp_path / "m"
    tracker = JsonlTracker(path)
    tracker.metrics({"a": 1.0}, step=1)
    tracker.metrics({"a": 2.0}, step=2)
    tracker.finish("KILLED")
    whole = path.read_bytes()
    for size in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:size])
        assert [row["step"] for row in read_metrics(path)] == [1]
        resumed = JsonlTracker(path)
        resumed.metrics({"a": 3.0}, step=3)
        resumed.finish("FINISHED")
        assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_a_damaged_line_and_a_missing_file_are_input_errors(tmp_path):
    (tmp_path / "m").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match="Line 2"):
        read_metrics(tmp_path / "m")
    with pytest.raises(InputError, match="There is no"):
        read_metrics(tmp_path / "absent")
