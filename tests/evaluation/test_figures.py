import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from metadist.core.errors import InputError
from metadist.core.measure import ACCURACY, LOSS
from metadist.evaluation.figures import (
    Compared,
    CurvePoint,
    adaptation_curve,
    comparison,
    scaling,
    task_picture,
    training_curve,
)

pytestmark = pytest.mark.usefixtures("figures")


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def curve(name, offset=0.0):
    return [CurvePoint(name, k, 0.95 - 0.7 * 0.4**k - offset, 0.01) for k in range(11)]


def test_adaptation_curves_and_baselines_are_drawn(tmp_path):
    rows = [*curve("MAML"), *curve("from scratch", 0.2), CurvePoint("nearest neighbour", None, 0.6, 0.02)]
    adaptation_curve(rows, "Omniglot, 5-way 1-shot, 600 test tasks", tmp_path / "figures" / "a.png", ACCURACY)
    assert png_size(tmp_path / "figures" / "a.png")[0] > 1000
    adaptation_curve(rows[-1:], "baseline alone", tmp_path / "b.png", LOSS)
    assert png_size(tmp_path / "b.png")[0] > 1000


def test_training_curves_skip_what_is_absent_or_not_finite(tmp_path):
    rows = [{"step": step, "train/loss": math.exp(-step / 100), "workers/tasks_per_s": 200.0} for step in range(400)]
    rows += [{"step": step, "validation/accuracy": 0.5 + step / 1000} for step in range(0, 400, 50)]
    rows.append({"step": 7, "train/loss": math.nan})
    training_curve(rows, tmp_path / "all.png")
    training_curve([{"step": 1, "validation/loss": 0.5}, {"step": 1, "train/loss": math.inf}], tmp_path / "one.png")
    assert png_size(tmp_path / "all.png")[1] > png_size(tmp_path / "one.png")[1]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written in this test."""
    found: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: found.append(self))
    return found


def test_scaling_is_each_measurement_the_medians_and_a_line_through_the_first(drawn, tmp_path):
    """With 2 workers 10, 30 and 20 tasks a second (median 20), with 6 workers 40 and 50 (median 45, of 60)."""
    measured = [(2, 10.0), (2, 30.0), (6, 40.0), (2, 20.0), (6, 50.0)]
    rows = [{"step": n, "workers/alive": w, "workers/tasks_per_s": r} for n, (w, r) in enumerate(measured)]
    rows += [{"step": 9, "workers/alive": 0, "workers/tasks_per_s": 5.0}, {"step": 9, "workers/alive": 4}]
    scaling(rows, tmp_path / "scaling.png")
    (axes,) = drawn[0].axes
    lines = [(line.get_label(), [*zip(*line.get_data(), strict=True)]) for line in axes.lines]
    assert sorted(point for label, points in lines if label.startswith("_") for point in points) == sorted(measured)
    assert dict(lines)["median"] == [(2, 20.0), (6, 45.0)] and dict(lines)["proportional"] == [(2, 20.0), (6, 60.0)]
    assert list(axes.get_xticks()) == [2, 6] and axes.get_ylim()[0] == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_task_is_its_support_pictures_by_class_and_its_confusions(drawn, tmp_path, channels):
    """Picture i is all i / 20; class 1 has pictures 1 and 3, class 0 the nine others, of which eight are shown."""
    labels = np.array([i % 2 if i < 4 else 0 for i in range(11)])
    images = np.stack([np.full((channels, 4, 5), i / 20, np.float32) for i in range(11)])
    images[9] = 1.5  # is shown as 1
    task_picture(images, labels, np.array([[7, 2], [1, 5]]), tmp_path / "task.png")
    left, right = drawn[0].subfigs
    shown = [float(np.max(np.asarray(axes.images[0].get_array()))) if axes.images else None for axes in left.axes]
    assert shown == [pytest.approx(v) if v is not None else None for v in
                     [0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 1.0, 0.05, 0.15, *[None] * 6]]  # fmt: skip
    assert left.axes[0].images[0].get_array().shape == ((4, 5) if channels == 1 else (4, 5, 3))
    (axes,) = right.axes
    texts = {text.get_position(): text.get_text() for text in axes.texts}  # (column, row): predicted, class
    assert texts == {(0, 0): "7", (1, 0): "2", (0, 1): "1", (1, 1): "5"}
    assert right.get_suptitle() == "12 of 15 queries right"


def test_one_step_is_drawn_as_bars(drawn, tmp_path):
    rows = [CurvePoint("MAML", 0, 0.25, 0.01), CurvePoint("MAML", 1, 0.75, 0.02), CurvePoint("ridge", None, 0.5, 0.04)]
    adaptation_curve(rows, "", tmp_path / "a.png", ACCURACY)
    (axes,) = drawn[0].axes
    assert [bar.get_height() for bar in axes.patches] == [25.0, 75.0, 50.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["MAML\nbefore", "MAML\nafter 1 step", "ridge"]
    halves = [(segment[1][1] - segment[0][1]) / 2 for segment in axes.collections[0].get_segments()]
    assert halves == pytest.approx([1.0, 2.0, 4.0])


def test_validation_is_drawn_with_its_interval(drawn, tmp_path):
    rows = [{"step": 5, "validation/accuracy": 0.5, "validation/accuracy_ci95": 0.125}, {"step": 7, "train/loss": 1.0},
            {"step": 9, "validation/accuracy": 0.75, "validation/accuracy_ci95": 0.25}]  # fmt: skip
    training_curve(rows, tmp_path / "t.png")
    (band,) = drawn[0].axes[1].collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(5, 37.5), (5, 62.5), (9, 50), (9, 100)}


def test_nothing_to_draw_is_an_input_error(tmp_path):
    with pytest.raises(InputError):
        scaling([{"step": 1, "workers/alive": 2}], tmp_path / "a.png")
    with pytest.raises(InputError):
        adaptation_curve([], "nothing", tmp_path / "a.png", ACCURACY)
    with pytest.raises(InputError):
        training_curve([{"step": 1, "time": 0.0}], tmp_path / "a.png")


def test_drawing_leaves_the_global_state_of_matplotlib_alone(tmp_path):
    code = (
        "import sys; from metadist.evaluation import figures; assert 'matplotlib' not in sys.modules\n"
        "from pathlib import Path\n"
        "figures.training_curve([{'step': 1, 'train/loss': 1.0}], Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "f.png")], check=True, timeout=120)


def loss_axis(drawn, tmp_path, losses):
    rows = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, 1)]
    training_curve(rows, tmp_path / "curve.png", "digits, maml, first")
    return drawn[-1].axes[0]


def test_a_loss_that_spans_decades_is_on_a_log_axis(drawn, tmp_path):
    assert loss_axis(drawn, tmp_path, [3.0, 2.0, 1.0, 0.5]).get_yscale() == "linear"
    assert loss_axis(drawn, tmp_path, [30.0, *[1.0] * 60]).get_yscale() == "log"
    assert loss_axis(drawn, tmp_path, [30.0, -1.0, 1.0]).get_yscale() == "linear"
    assert loss_axis(drawn, tmp_path, [*[1.0] * 60, 0.001]).get_yscale() == "linear"  # one lucky batch
    assert drawn[-1].axes[0].get_title() == "digits, maml, first"


def test_numbers_logged_close_together_are_one_point(drawn, tmp_path):
    """1001 steps in 200 parts of 5; of 60 more numbers within two parts no more points come."""
    rows = [{"step": step, "train/loss": float(step)} for step in range(0, 1001, 5)]
    rows += [{"step": 500 + n / 7, "train/loss": 1000.0} for n in range(60)]
    training_curve(rows, tmp_path / "curve.png")
    steps = [list(line.get_xdata()) for line in drawn[0].axes[0].lines][0]
    assert len(steps) == 200 and min(b - a for a, b in zip(steps, steps[1:], strict=False)) > 2


def test_one_point_is_a_bar_beside_its_baselines(drawn, tmp_path):
    rows = [CurvePoint("meta-learned", 0, 0.7, 0.02), CurvePoint("nearest class mean", None, 0.6, 0.02)]
    adaptation_curve(rows, "digits, protonet, first", tmp_path / "bars.png", ACCURACY)
    (axes,) = drawn[0].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([70.0, 60.0])
    assert axes.get_title() == "digits, protonet, first"


def test_a_comparison_has_a_line_for_each_run(drawn, tmp_path):
    rows = [Compared("a", 0.7, 0.01, math.nan, math.nan, True), Compared("b", 0.8, 0.02, 0.1, 0.005, False)]
    comparison(rows, "digits", tmp_path / "c.png", ACCURACY)
    left, right = drawn[0].axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["a", "b"]
    assert [float(line.get_xdata()[0]) for line in left.lines if line.get_marker() == "o"] == pytest.approx([70, 80])
    (point,) = [line for line in right.lines if line.get_marker() == "o"]
    assert point.get_xdata()[0] == pytest.approx(10) and point.get_markerfacecolor() == "white"
    assert "hollow" in right.get_xlabel()
