import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.core.messages import Chunk, Weights
from metadist.core.task import TaskId
from metadist.data import Shapes
from metadist.data.importers import table
from metadist.data.sources import ClassSource, ValueSource
from metadist.learners import LEARNERS, MAML
from metadist.models import MLP, Bag, Conv4
from metadist.models.losses import cross_entropy, mean_squared_error
from metadist.run.auto import aggregation, chunk_size
from metadist.run.build import Job

JOBS = sorted((Path(__file__).resolve().parents[2] / "jobs").glob("*.yaml"))
IMAGES = Shapes([[1, 28, 28]], False, None, 5, True)
VECTORS = Shapes([[4]], False, None, 3, True)
TEXT = Shapes([[12], [12]], True, 50, 5, True)
CURVES = Shapes([[1]], False, None, 1, False)


def config_of(*overrides: str):
    return load_config([], ["data.family=digits", *overrides])


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_every_job_file_builds_its_engine_without_its_data(job):
    config = load_config([job])
    name = job.stem.partition("_")[0]
    shapes = {"omniglot": IMAGES, "digits": IMAGES, "letters": IMAGES, "clinc150": TEXT, "sinusoid": CURVES}[name]
    engine, later = Job(config, shapes).engine(), Job(config, shapes).evaluation_engine()
    assert later.learner.inner_steps == (config.evaluation.inner_steps or engine.learner.inner_steps)
    assert torch.equal(engine.initial_theta(), later.initial_theta())
    Job(config).optimization(engine)


@pytest.mark.parametrize(("shapes", "kind"), [
    (IMAGES, Conv4), (VECTORS, MLP), (TEXT, Bag), (CURVES, MLP), (Shapes([[3, 4, 4]], False, None, 2, True), MLP),
])  # fmt: skip
def test_the_model_follows_the_inputs(shapes, kind):
    assert isinstance(Job(config_of(), shapes).fresh_model().module, kind)


def test_the_models_weights_are_a_function_of_the_seed():
    first, again, other = (Job(config_of(f"seed={seed}"), VECTORS).engine().initial_theta() for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_text_model_has_the_datas_vocabulary_unless_the_job_says_otherwise():
    assert Job(config_of(), TEXT).fresh_model().parameters["embedding.weight"].shape[0] == 50
    config = config_of("model.name=bag", "model.vocabulary_size=70")
    assert Job(config, TEXT).fresh_model().parameters["embedding.weight"].shape[0] == 70


@pytest.mark.parametrize(("override", "told"), [
    ("learner.inner_lrr=0.1", "maml .*'inner_lrr'.* inner_lr"),
    ("learner.inner_steps=1.5", "maml: inner_steps=1.5: .*integer"),
    ("learner.inner_lr=fast", "maml: inner_lr='fast': .*number"),
    ("learner.name=mamml", "learner.name=mamml .*maml"),
    ("learner.name=MAML", "learner.name=MAML .*maml"),
    ("learner.adapted=haed.*", "learner.adapted: 'haed.*' matches no parameter"),
    ("learner.inner_lr=true", "maml: inner_lr=True: .*number"),
    ("learner.name=torch.nn:Linear", "learner.name=torch.nn:Linear .*metadist.Learner"),
    ("model.hiden=[3]", "mlp .*'hiden'.* hidden"),
    ("model.hidden=3", "mlp: hidden=3"),
    ("model.name=mpl", "model.name=mpl .*mlp"),
    ("model.name=torch.nn:Linear", "torch.nn:Linear .*'in_features'"),
    ("model.name=fractions:Fraction", "fractions:Fraction .*torch.nn.Module"),
    ("loss=hinge", "loss=hinge is"),
    ("loss=mse", "loss=mse .*cross_entropy"),
])  # fmt: skip
def test_options_are_checked_against_what_they_are_options_of(override, told):
    with pytest.raises(InputError, match=told):
        Job(config_of("model.name=mlp", override), VECTORS).engine()


@pytest.mark.parametrize(("learner", "option", "reason"), [
    ("meta_sgd", "inner_lr=0.1", "it learns rates"), ("protonet", "inner_lr=0.1", "it adapts in closed form"),
    ("r2d2", "inner_steps=1", "it adapts in closed form"), ("reptile", "adapted=head.*", "it adapts all parameters"),
    ("imaml", "first_order=true", "it has no first-order form"), ("platipus", "adapted=head.*", "adapts all"),
])  # fmt: skip
def test_an_option_that_would_say_nothing_is_refused(learner, option, reason):
    key, _, value = option.partition("=")
    with pytest.raises(InputError, match=rf"learner {learner} .*learner\.{key}.*{reason}.*{key}=null"):
        Job(config_of(f"learner.name={learner}", f"learner.{option}"), VECTORS).engine()
    if key in ("inner_lr", "inner_steps"):
        config = config_of(f"learner.name={learner}", f"evaluation.{option}", f"learner.{key}=null")
        with pytest.raises(InputError, match=f"learner {learner} .*evaluation.{key}.*{reason}"):
            Job(config, VECTORS).evaluation_engine()


def test_a_learner_without_options_suggests_none():
    with pytest.raises(InputError, match="protonet .*'inner_optimizer'"):
        Job(config_of("learner.name=protonet", "learner.inner_optimizer=adam"), VECTORS).engine()


def test_cross_entropy_is_not_for_values():
    with pytest.raises(InputError, match="loss=cross_entropy .*mse"):
        _ = Job(config_of("loss=cross_entropy"), CURVES).loss


def test_the_order_of_time_needs_data_that_has_it(tmp_path):
    (tmp_path / "t.csv").write_text("user,x,y,day\n" + "".join(f"u{n % 3},{n},{n / 2},{-n}\n" for n in range(30)))
    small = ["data.family=null", "task.shots=2", "task.queries=3", "task.order=time"]
    for time in (None, "day"):
        out = table(tmp_path / "t.csv", tmp_path / str(time), group="user", inputs=["x"], targets=["y"], time=time)
        job = Job(config_of(*small, f"data.path={out}"))
        if time is None:
            with pytest.raises(InputError, match="task.order=time needs data .* --time COLUMN"):
                _ = job.source
        else:
            support, query = (part.inputs[0] for part in job.source(TaskId("train", 0, 0)))
            assert support.min() > query.max()  # x falls as time goes on
            assert job.evaluation(job.engine("cpu"), []).caption["order"] == "time"
            job = Job(config_of(*small, f"data.path={out}", "task.order=random"))
            assert "order" not in job.evaluation(job.engine("cpu"), []).caption


def test_a_second_order_reptile_is_an_input_error():
    with pytest.raises(InputError, match="reptile .*learner.first_order"):
        Job(config_of("learner.name=reptile", "learner.first_order=false"), VECTORS).engine()


def test_modules_of_the_current_directory_are_found(tmp_path, monkeypatch):
    (tmp_path / "tests_own_model.py").write_text(
        "from torch import nn\n\ndef network(width: int = 2):\n    return nn.Linear(4, width)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])
    model = Job(config_of("model.name=tests_own_model:network", "model.width=3"), VECTORS).fresh_model()
    assert model.parameters["weight"].shape == (3, 4)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_can_be_named(name):
    steps = [] if name in ("r2d2", "protonet") else ["learner.inner_steps=3"]
    own = {
        "cavia": ["model.name=mlp", "model.context=2"],
        "policy_gradient": ["learner.environment=metadist.environments:Navigation"],
    }
    learner = Job(config_of(f"learner.name={name}", *steps, *own.get(name, [])), VECTORS).engine().learner
    assert learner.inner_steps == (3 if steps else 0)
    assert type(learner) is LEARNERS[name][0]
    assert learner.first_order == (name in ("fomaml", "reptile"))


def test_a_name_sets_options_that_a_job_may_override():
    learner = Job(config_of("learner.name=anil", "learner.adapted=head.weight"), VECTORS).engine().learner
    assert isinstance(learner, MAML) and learner.adapted_names() == ["head.weight"]


def test_numbers_in_learner_options_may_be_written_with_an_exponent():
    assert Job(config_of("learner.inner_lr=1e-3"), VECTORS).engine().learner.inner_lr == 1e-3


def test_losses_and_metrics_follow_the_kind_of_task():
    config = config_of()
    assert Job(config, VECTORS).loss is cross_entropy and Job(config, CURVES).loss is mean_squared_error
    assert list(Job(config, VECTORS).metrics()) == ["accuracy", "confidence", "loss"]
    assert list(Job(config, CURVES).metrics()) == ["loss"]
    assert Job(config_of("loss=torch.nn.functional:l1_loss"), CURVES).loss is torch.nn.functional.l1_loss


def test_convolutions_of_large_images_run_task_by_task_on_a_cpu_and_the_rest_batched():
    small, on_gpu = IMAGES._replace(inputs=[[1, 16, 16]]), ["fleet.gpus_per_worker=1"]
    assert [Job(config_of(*job), shapes).engine("cpu").kind for shapes in (IMAGES, small, VECTORS)
            for job in ([], on_gpu)] == ["loop", "vmap", "vmap", "vmap", "vmap", "vmap"]  # fmt: skip
    assert Job(config_of("engine.kind=vmap"), IMAGES).engine().kind == "vmap"
    assert [chunk_size(config_of(), Job(config_of(), shapes).engine()) for shapes in (IMAGES, small, VECTORS)] == [
        4,
        8,
        32,
    ]


def test_long_second_order_inner_loops_are_computed_again_and_short_ones_kept():
    long = "learner.inner_steps=50"
    jobs = ["learner.inner_steps=10"], ["learner.inner_steps=11"], ["learner.name=fomaml", long], [
        "engine.differentiation=unroll", long]  # fmt: skip
    modes = [Job(config_of(*job), VECTORS).engine().method.differentiation for job in jobs]
    assert modes == ["unroll", "remat", "unroll", "unroll"]
    spacings = [Job(config_of("learner.inner_steps=50", *job), VECTORS).engine().method.spacing
                for job in ([], ["engine.keep=sqrt"])]  # fmt: skip
    assert spacings == [1, 7]


def test_the_driver_itself_compiles_nothing():
    config = config_of("engine.compile=true")
    assert Job(config, VECTORS).engine().method.compiled
    config = config_of("engine.cuda_graphs=true", "engine.autocast=true", "fleet.gpus_per_worker=1")
    method = Job(config, VECTORS).engine("cpu").method
    assert not method.captured and not method.autocast


def test_chunks_and_aggregation_follow_the_engine_alone():
    engines = [Job(config_of(), shapes).engine() for shapes in (IMAGES, VECTORS)]
    assert [chunk_size(config_of("num_workers=9"), engine) for engine in engines] == [4, 32]
    assert chunk_size(config_of("engine.chunk_size=7"), engines[0]) == 7
    assert [aggregation(config_of(), engine) for engine in engines] == ["task", "task"]
    big = config_of("engine.chunk_size=100000")
    assert aggregation(big, engines[1]) == "chunk" and aggregation(big.model_copy(), engines[0]) == "chunk"
    assert aggregation(config_of("engine.aggregate=chunk"), engines[1]) == "chunk"


def test_the_server_gets_its_settings():
    config = config_of("meta_lr=0.5", "meta_steps=9", "optimizer.name=adamw", "optimizer.clip_norm=3",
                       "tasks_per_worker=4", "num_workers=3", "optimizer.batch_rule=linear")  # fmt: skip
    optimization = Job(config).optimization(Job(config, VECTORS).engine())
    assert (optimization.optimizer, optimization.meta_lr, optimization.meta_steps) == ("adamw", 0.5, 9)
    assert (optimization.clip_norm, optimization.reference_batch) == (3, 4)
    assert optimization.rate(0, 24) == 3.0


def test_initial_weights_are_read_from_a_file(tmp_path):
    config = config_of("model.name=mlp", "model.hidden=[]", f"model.weights={tmp_path / 'w.safetensors'}")
    with pytest.raises(InputError, match="w.safetensors"):
        Job(config, VECTORS).fresh_model()
    save_file({"head.weight": np.ones((3, 4), np.float32), "head.bias": np.full(3, 2, np.float32)},
              tmp_path / "w.safetensors")  # fmt: skip
    assert Job(config, VECTORS).engine().initial_theta().tolist() == [1] * 12 + [2] * 3
    save_file({"head.weight": np.ones((2, 4), np.float32)}, tmp_path / "w.safetensors")  # of another shape
    with pytest.raises(InputError, match="w.safetensors"):
        Job(config, VECTORS).fresh_model()


def test_training_from_scratch_is_for_the_classes_of_evaluation():
    """A learner that takes any number of ways may be judged on more than its model has outputs."""
    own = ["task.ways=2", "task.queries=3", "evaluation.ways=3", "learner.name=protonet", "model.name=mlp"]
    worker = Job(config_of(*own, "evaluation.scratch_steps=2")).worker()
    weights = Weights(0, worker.engine.initial_theta().numpy())
    found = worker.evaluate(weights, Chunk("test", 0, 0, 2), ("from_scratch",))
    assert found["from_scratch/accuracy"].shape == (2,)


def test_sources_of_training_and_evaluation_differ_as_the_job_says():
    config = config_of("task.ways=3", "task.shots=2", "evaluation.ways=2", "evaluation.queries=4", "evaluation.shots=3")
    training, evaluation = Job(config).source, Job(config).evaluation_source
    assert isinstance(training, ClassSource) and isinstance(evaluation, ClassSource)
    assert (training.ways, training.shots, training.queries) == (3, 2, 15)
    assert (evaluation.ways, evaluation.shots, evaluation.queries) == (2, 3, 4)


def test_shapes_are_read_off_a_task():
    config = config_of("task.ways=3")
    image = {"dtype": "uint8", "offset": 0.0, "scale": 1 / 16}
    assert Job(config).shapes == Shapes([[1, 8, 8]], False, None, 3, True, [image], [], ["float32"], [[]])
    curves = load_config([], ["data.family=sinusoid", "data.options={groups: [5, 2, 2]}"])
    assert isinstance(Job(curves).source, ValueSource)
    assert Job(curves).shapes[:5] == CURVES[:5]


def test_missing_data_names_the_command_that_makes_it(tmp_path):
    config = load_config([], [f"data.path={tmp_path / 'none'}"])
    with pytest.raises(InputError, match=r"none: .*`metadist data \.\.\. --out"):
        _ = Job(config).source


def test_a_users_own_source_gets_the_seed_and_its_options(tmp_path, monkeypatch):
    (tmp_path / "tests_own_source.py").write_text(
        "import numpy as np\nfrom metadist import Draws, Task\n\n"
        "class Lines:\n    outputs = 1\n\n"
        "    def __init__(self, seed: int, slope: float):\n        self.seed, self.slope = seed, slope\n\n"
        "    def __call__(self, task_id):\n        x = Draws(self.seed, task_id).uniform(8)[:, None]\n"
        "        return Task.of(x[:3], self.slope * x[:3], x[3:], self.slope * x[3:])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere", *__import__("sys").path])
    own = ["data.source=tests_own_source:Lines", "seed=5"]
    config = load_config([], [*own, "data.options={slope: 2e0}", "fleet.backend=local"])
    task = Job(config).source(TaskId("train", 0, 0))
    assert np.array_equal(task.query.targets[0], 2 * task.query.inputs[0])
    worker = Job(config).worker()
    report, rows = worker.meta_gradients(Weights(0, worker.engine.initial_theta().numpy()), Chunk("train", 0, 0, 2))
    assert np.isfinite(report.losses).all() and rows.shape == (2, worker.engine.layout.size)
    with pytest.raises(InputError, match="tests_own_source:Lines .*'slope'"):
        _ = Job(load_config([], own)).source
    with pytest.raises(InputError, match="'slop'.* slope"):
        _ = Job(load_config([], [*own, "data.options={slop: 2}"])).source


def test_outputs_beyond_the_ways_of_evaluation_are_no_classes():
    """Of five outputs the first three count: the largest of those, and their share among themselves."""
    config = load_config([], ["data.family=digits", "task.ways=5", "evaluation.ways=3"])
    found = Job(config, VECTORS).metrics(3)
    outputs = torch.tensor([[2.0, 0.0, 0.0, 9.0, 0.0], [0.0, 0.0, 1.0, 5.0, 7.0], [0.0, 1.0, 0.0, 0.0, math.nan]])
    assert float(found["accuracy"](outputs, torch.tensor([0, 2, 2]))) == pytest.approx(2 / 3)
    shares = [math.exp(2) / (math.exp(2) + 2), *[math.e / (math.e + 2)] * 2]
    assert float(found["confidence"](outputs, torch.tensor([0, 2, 2]))) == pytest.approx(sum(shares) / 3, rel=1e-6)
    outputs[2, 1] = math.nan
    assert found["accuracy"](outputs, torch.tensor([0, 2, 2])).isnan()
