"""The settings of the papers' tables (`tests/benchmarks/papers.py`)."""

import pytest

from metadist.config import load_config
from tests.benchmarks.papers import CELLS, COMMON, JOBS, TRAININGS


@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
def test_a_training_and_its_cells_are_valid_and_say_what_the_table_says(training):
    settings = [*COMMON, *training.settings, f"meta_steps={training.meta_steps}", "data.path=data/omniglot"]
    job = [str(JOBS / f"{training.learner}.yaml")]
    config = load_config(job, settings)
    cells = [cell for cell in CELLS if cell.training == training.name]
    assert cells and len({cell.paper.rotated_test for cell in cells}) == 1
    assert config.evaluation.every <= training.meta_steps and config.task.shots + config.task.queries <= 20
    for cell in cells:
        tested = load_config(job, [*settings, *cell.settings]).evaluation
        assert (tested.ways or config.task.ways, tested.shots or config.task.shots) == (cell.ways, cell.shots)
        assert tested.transductive == cell.paper.transductive and tested.test_tasks <= cell.paper.test_tasks
        assert cell.shots + (tested.queries or 0) <= 20


def test_no_cell_is_there_twice():
    assert len({cell.name for cell in CELLS}) == len(CELLS) == 7 * 4
    assert len({training.name for training in TRAININGS}) == len(TRAININGS)
