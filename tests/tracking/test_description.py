import math

import pytest

from metadist.core.measure import ACCURACY
from metadist.tracking.description import DESCRIPTION, RunDescription, figure, noise_reading, results_table


def test_it_is_rewritten_at_each_validation_and_says_how_the_run_ended():
    texts = []
    run = RunDescription(lambda tags: texts.append(tags[DESCRIPTION]), total_steps=20)
    run.about, run.commands = "maml on digits", "`metadist evaluate runs/x`"
    run.remember({"validation/accuracy": 0.9, "validation/accuracy_ci95": 0.01}, 2)
    run.metrics({"train/loss": 1.0, "workers/alive": 1.0, "workers/target": 2.0}, 4)
    assert texts == []
    run.metrics({"validation/accuracy": 0.8, "validation/diverged_tasks": 0.0}, 5)
    assert "running, step 5 of 20, 1 of 2 workers" in texts[0]
    assert "90.00 % ± 1.00, step 2" in texts[0] and "maml on digits" in texts[0] and "metadist evaluate" in texts[0]
    run.metrics({"validation/accuracy": 0.95, "validation/diverged_tasks": 0.0}, 10)
    assert "95.00 %" in texts[1] and "step 10" in texts[1]
    run.finish("KILLED")
    assert "stopped" in texts[2] and len(texts) == 3


@pytest.mark.parametrize(("scale", "word"), [(210, "more tasks"), (32, "suits"), (3, "fewer tasks")])
def test_the_noise_scale_is_read_in_words(scale, word):
    assert f"about {scale} tasks, meta-batch 32" in noise_reading(scale, 32) and word in noise_reading(scale, 32)


def test_a_noise_scale_without_a_value_is_not_read():
    texts = []
    run = RunDescription(lambda tags: texts.append(tags[DESCRIPTION]), total_steps=2)
    run.metrics({"train/noise_scale_tasks": math.inf, "train/meta_batch_size": 4.0}, 1)
    run.finish("FINISHED")
    assert "oise" not in texts[0]


def test_the_table_has_the_result_its_baselines_and_the_verdict():
    point = {"mean": 0.5, "ci95": 0.25, "diverged_tasks": 0}
    results = {
        "protocol": {"split": "test", "tasks": 8}, "begun": "before adaptation", "verdict": "level with ridge",
        "loss": {"before": {"mean": 2.0, "ci95": 0.5}, "after": point, "by_inner_step": [point, point]},
        "baselines": {"joint": {"tasks": 4, "loss": [point, {"mean": 0.75, "ci95": 0.125}]}},
    }  # fmt: skip
    assert results_table(results).splitlines() == [
        "Level with ridge.", "", "| test | loss, 95 % interval | tasks |", "|---|---|---|",
        "| **after 1 inner step** | **0.5000 ± 0.2500** | 8 |", "| before adaptation | 2.0000 ± 0.5000 | 8 |",
        "| joint | 0.7500 ± 0.1250 | 4 |",
    ]  # fmt: skip
    more = results_table({**results, "advice": ["more steps"], "few_tasks": "8 tasks are of one group"})
    assert more.startswith("Level with ridge.\n\n- Try: more steps\n\n| test |")
    assert more.endswith("\n\n8 tasks are of one group.")
    assert figure(ACCURACY, {"diverged_tasks": 3}) == "none: 3 tasks diverged"
