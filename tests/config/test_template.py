from metadist.config import load_config
from metadist.config.template import new_job
from metadist.data import Shapes
from metadist.run.build import Job


def test_a_new_job_loads_and_builds(tmp_path):
    (tmp_path / "job.yaml").write_text(new_job())
    config = load_config([tmp_path / "job.yaml"])
    assert config.data.family == "digits" and config.task.ways == 3
    assert Job(config, Shapes([[1, 8, 8]], False, None, 3, True)).engine().learner.inner_lr == 0.1


def test_a_new_job_explains_its_settings():
    assert "shots: 5  # K, support examples per class" in new_job()
