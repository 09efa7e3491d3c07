from pathlib import Path

import numpy as np
import pytest
import torch

from metadist import MAML, Examples, Model, Task, TaskId, load_config, train
from metadist.data import About, DatasetWriter, Field, Group, staging
from metadist.learners import Fast
from metadist.models import SIREN
from metadist.models.losses import mean_squared_error
from tests.examples import fields

SIDE, TEST = 8, TaskId("test", 0, 0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Plane waves of ink, 6 in each of 3 groups a split."""
    down, right = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    splits = ("train",) * 3 + ("validation",) * 3 + ("test",) * 3
    groups = [Group(f"g{n}", split, 6) for n, split in enumerate(splits)]
    waves = [127 * (1 + np.sin(0.1 * n * down + right + n)) for n in range(54)]
    with staging(tmp_path / "pictures", overwrite=False) as directory:
        field = Field("image", "input", "uint8", (1, SIDE, SIDE), scale=1 / 255)
        writer = DatasetWriter(directory, [field], groups, About("classes", "made up", "none", {}))
        writer.add(np.arange(9).repeat(6), {"image": np.stack(waves).astype(np.uint8)[:, None]})
        writer.finish()
    return tmp_path / "pictures"


def test_a_task_is_one_drawing_each_pixel_once(pictures: Path) -> None:
    source = fields.Drawings(0, str(pictures), known=20)
    task, again = source(TaskId("train", 2, 1)), source(TaskId("train", 2, 1))
    assert [len(part.inputs[0]) for part in task] == [20, SIDE * SIDE - 20]
    places = np.concatenate([part.inputs[0] for part in task])
    ink = np.concatenate([part.targets[0] for part in task])
    np.testing.assert_array_equal(places[:20], again.support.inputs[0])
    cells = ((places + 1) * (SIDE - 1) / 2).round().astype(int)
    assert len({tuple(cell) for cell in cells.tolist()}) == SIDE * SIDE
    picture = np.empty((SIDE, SIDE))
    picture[tuple(cells.T)] = ink[:, 0]
    stored = source.tables["train"].gather(np.arange(18)).inputs[0][:, 0]
    assert (np.abs(stored - picture).max(axis=(1, 2)) < 1e-6).sum() == 1


def test_decibels_of_a_known_error() -> None:
    ink = torch.zeros(4, 1)
    assert fields.psnr(ink + 0.1, ink).item() == pytest.approx(20)
    assert fields.psnr(ink + 0.01, ink).item() == pytest.approx(40)


def test_interpolation_is_exact_on_a_plane_and_nearest_outside(pictures: Path) -> None:
    task = fields.Drawings(0, str(pictures), known=30)(TEST)
    plane = [part._replace(targets=(part.inputs[0] @ np.array([[0.2], [0.1]], np.float32),)) for part in task]
    task = task._replace(support=plane[0], query=plane[1])
    found, exact = fields.interpolated(task), task.query.targets[0]
    near = np.abs(found - exact)[:, 0] < 1e-5
    assert near.mean() > 0.7
    assert np.isin(np.float32(found[~near]), task.support.targets[0]).all()


def test_a_network_from_scratch_is_the_same_each_time_and_better_with_more_steps(pictures: Path) -> None:
    task = fields.Drawings(0, str(pictures), known=40)(TEST)
    state = torch.get_rng_state()
    few, again, many = (fields.scratch(task, steps, 0.003, 5.0, (16, 16)) for steps in (2, 2, 200))
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(few, again)
    errors = [np.square(found - task.query.targets[0]).mean() for found in (few, many)]
    assert errors[1] < 0.5 * errors[0]


def test_the_figure_shows_the_drawing_and_the_field_at_each_step(pictures: Path) -> None:
    source = fields.Drawings(0, str(pictures), known=30)
    learner = MAML(model=Model(SIREN([[2]], 1, (8,), 5.0)), loss=mean_squared_error, inner_lr=0.01, inner_steps=1)
    task = Task(*(Examples(*(tuple(map(torch.from_numpy, arrays)) for arrays in part)) for part in source(TEST)))
    theta = learner.layout()
    fast = Fast({name: theta[name] for name in learner.adapted_names()}, {})
    figure = fields.before_and_after(learner, theta, [fast, fast], task)
    assert [axes.get_title() for axes in figure.axes] == ["known", "before", "after 1 step", "drawing"]
    known, *fitted, drawing = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    stored = source.tables["test"].gather(np.arange(18)).inputs[0][:, 0]
    assert (np.abs(stored - drawing).max(axis=(1, 2)) < 1e-6).sum() == 1
    assert np.isfinite(known).sum() == 30 and np.array_equal(known[np.isfinite(known)], drawing[np.isfinite(known)])
    down, right = np.argwhere(np.isfinite(known))[0]
    place = torch.tensor([[down, right]]) * 2 / (SIDE - 1) - 1
    assert fitted[0][down, right] == pytest.approx(learner.model(theta, place.float()).item(), abs=1e-5)


def test_a_job_of_fields(pictures: Path, tmp_path: Path, figures) -> None:
    job = Path(__file__).resolve().parents[2] / "jobs" / "domains" / "field.yaml"
    config = load_config(
        [job],
        [f"data.options.path={pictures}", "data.options.known=20", "model.hidden=[8]", "meta_steps=4", "num_workers=1",
         "evaluation.every=2", "evaluation.tasks=3", "evaluation.test_tasks=3", "fleet.backend=local",
         "tracking.mlflow=false", f"run_dir={tmp_path / 'run'}"],
    )  # fmt: skip
    results = train(config, quiet=True)
    assert len(results["psnr"]["by_inner_step"]) == 3
    asked = {name.rpartition(":")[2] for name in config.evaluation.baselines or ()}
    assert {name.rpartition(":")[2] for name in results["baselines"]} == asked
    assert (tmp_path / "run" / "field.png").stat().st_size > 1000
