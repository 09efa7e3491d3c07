import math
import subprocess
import sys

import pytest

from metadist.core.errors import InputError
from metadist.evaluation.figures import CurvePoint, adaptation_curve, training_curve

pytestmark = pytest.mark.usefixtures("figures")


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def curve(name, offset=0.0):
    return [CurvePoint(name, k, 0.95 - 0.7 * 0.4**k - offset, 0.01) for k in range(11)]


def test_adaptation_curves_and_baselines_are_drawn(tmp_path):
    rows = [*curve("MAML"), *curve("from scratch", 0.2), CurvePoint("nearest neighbour", None, 0.6, 0.02)]
    adaptation_curve(rows, "Omniglot, 5-way 1-shot, 600 test tasks", tmp_path / "figures" / "a.png")
    assert png_size(tmp_path / "figures" / "a.png")[0] > 1000
    adaptation_curve(rows[-1:], "baseline alone", tmp_path / "b.png", metric="loss")
    assert png_size(tmp_path / "b.png")[0] > 1000


def test_training_curves_skip_what_is_absent_or_not_finite(tmp_path):
    rows = [{"step": step, "train/loss": math.exp(-step / 100), "workers/tasks_per_s": 200.0} for step in range(400)]
    rows += [{"step": step, "validation/accuracy": 0.5 + step / 1000} for step in range(0, 400, 50)]
    rows.append({"step": 7, "train/loss": math.nan})
    training_curve(rows, tmp_path / "all.png")
    training_curve([{"step": 1, "validation/loss": 0.5}, {"step": 1, "train/loss": math.inf}], tmp_path / "one.png")
    assert png_size(tmp_path / "all.png")[1] > png_size(tmp_path / "one.png")[1]


def test_nothing_to_draw_is_an_input_error(tmp_path):
    with pytest.raises(InputError):
        adaptation_curve([], "nothing", tmp_path / "a.png")
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
