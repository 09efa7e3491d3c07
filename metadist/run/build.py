"""The objects of a run, from its `Config`, of which nothing below this room knows (`evaluation` its own section)."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadist.config import Config
from metadist.core.errors import InputError
from metadist.core.task import Split, TaskId
from metadist.data import (
    ClassSource,
    Dataset,
    LabelledSource,
    Shapes,
    Source,
    Stream,
    TableSource,
    ValueSource,
    cached,
    dataset_at,
    open_dataset,
    preprocessing_of,
    task_shapes,
)
from metadist.engine import Engine
from metadist.evaluation import Evaluation, Evaluator, Joint, Measure, choose_baselines, fine_tuning
from metadist.fleet.server import Optimization
from metadist.fleet.worker import Worker, set_up_process
from metadist.learners import MAML
from metadist.models import LOSSES, MODELS, Loss, Model, accuracy, confidence
from metadist.run.auto import aggregation, chunk_size, make_method, worker_device
from metadist.run.plugins import call, make_learner, make_loss, make_model, resolve


class Job:
    """The parts of one job, each made when it is first asked for and then shared: data, tasks, model, engines.

    Training and evaluation compute with one model where both are on one device: it must keep no state between calls.
    `shapes`: known already, so that no task is drawn for them. `data_name`: of the dataset in the driver's cache, where
    `data.path` is a URI. `quiet`: no progress on stderr while built-in data is made.
    """

    def __init__(self, config: Config, shapes: Shapes | None = None, data_name: str | None = None, quiet: bool = False):
        self.config = config
        self._quiet = quiet
        self._data_name = data_name
        self._shapes = shapes
        self._models: dict[tuple[int, str], Model] = {}
        self._engines: dict[tuple[bool, str, int], Engine] = {}

    @cached_property
    def dataset(self) -> Dataset | None:
        """The dataset (built or fetched first where need be), or None where the job brings its own source."""
        data = self.config.data
        if data.source:
            return None
        if data.family:
            return open_dataset(cached(data.family, data.options, self._quiet))
        assert data.path
        return dataset_at(data.path, self._data_name)

    def make_parts(self) -> None:
        """Set up this process, open the dataset, and make now what the job names: model, loss, learner and the user's
        own pieces. Raises InputError where one of them is not there or does not fit."""
        set_up_process(self.config.fleet.threads_per_worker)
        self.engine("cpu")
        self.evaluation_engine("cpu")
        _ = self.measure, self.metrics(), self.baselines(), self.own_figures

    @cached_property
    def source(self) -> Source:
        """The tasks of training."""
        return self._online(self._source(evaluation=False))

    @cached_property
    def evaluation_source(self) -> Source:
        """The tasks of evaluation, with its own ways, shots and queries."""
        return self._online(self._source(evaluation=True))

    def _online(self, source: Source) -> Source:
        rounds = self.config.task.steps_per_round
        return Stream(self._source(evaluation=False), source, rounds, self.config.seed) if rounds else source

    def _source(self, evaluation: bool) -> Source:
        data, task, own, seed = self.config.data, self.config.task, self.config.evaluation, self.config.seed
        in_order = self._in_time()
        if self.dataset is None:
            assert data.source
            return call(data.source, resolve(data.source), {"seed": seed, **data.options})
        ways = own.ways if evaluation and own.ways else task.ways
        shots = own.shots if evaluation and own.shots else task.shots
        queries = own.queries if evaluation and own.queries else task.queries
        splits, scheme = self.dataset.splits, self.dataset.kind if task.scheme == "auto" else task.scheme
        drawn: Any = {"shots": shots, "queries": queries, "seed": seed, "in_order": in_order}
        window = task.order == "window"
        if window and scheme != "values":
            raise InputError(f"task.order=window needs tasks of scheme values, and these are {scheme}: set it to time")
        if scheme == "classes":
            return ClassSource(splits, **drawn, ways=ways, within_parent=task.within_parent)
        if scheme == "labelled":
            return LabelledSource(splits, **drawn, ways=ways, permute_labels=task.permute_labels)
        return ValueSource(splits, **drawn, window=window)

    def _in_time(self) -> bool:
        """Whether tasks keep the order of time. Raises InputError where the data does not say it."""
        order, dataset = self.config.task.order, self.dataset
        if order != "random" and (dataset is None or "time" not in dataset.metadata["extra"]):
            raise InputError(
                f"task.order={order} needs data whose rows are in the order of time: import it with `metadist data "
                "table ... --time COLUMN`, or set task.order=random"
            )
        return order != "random"

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes and kinds of a training task's arrays."""
        return self._shapes or task_shapes(self.source, self.dataset)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How raw examples become the arrays of a task, as plain values; arrays alone are taken where there is no
        dataset."""
        return preprocessing_of(self.dataset) if self.dataset else {}

    @cached_property
    def loss(self) -> Loss:
        kinds = {np.dtype(unit["dtype"]).kind for unit in self.shapes.target_units}
        if self.config.loss in ("auto", "mse") and {"i", "f"} <= kinds:
            raise InputError(
                f"loss={self.config.loss} would take a target of whole numbers, such as an action, for a size: name a "
                "loss that knows what it is, such as metadist.models.bandit:direct_method, or import without --integer"
            )
        return make_loss(self.config.loss, self.shapes.classification)

    def fresh_model(self, outputs: int | None = None) -> Model:
        """A model of its own, with initial weights and so many outputs (default: as many as a training task needs)."""
        shapes = self.shapes if outputs is None else self.shapes._replace(outputs=outputs)
        return make_model(self.config.model, self.config.seed, shapes)

    def model(self, outputs: int | None = None, device: str = "cpu") -> Model:
        """The model of that many outputs, one for all engines of a device."""
        key = outputs or self.shapes.outputs, device
        if key not in self._models:
            self._models[key] = self.fresh_model(key[0])
        return self._models[key]

    def engine(self, device: str | None = None) -> Engine:
        """The engine of training on a device (default: the workers'; elsewhere it need not be fast)."""
        return self._engine(False, device or worker_device(self.config), self.shapes.outputs, {})

    def evaluation_engine(self, device: str | None = None, outputs: int | None = None) -> Engine:
        """The engine with the inner steps and rate of evaluation."""
        settings = self.config.evaluation
        changes = {"inner_steps": settings.inner_steps, "inner_lr": settings.inner_lr}
        changes = {name: value for name, value in changes.items() if value is not None}
        engine = self._engine(True, device or worker_device(self.config), outputs or self.shapes.outputs, changes)
        if settings.inner_lr is not None and engine.learner.learned_rates:
            raise InputError(f"evaluation.inner_lr: learner {self.config.learner.name} learns its rates: leave it out")
        return engine

    def _engine(self, evaluation: bool, device: str, outputs: int, changes: Mapping[str, Any]) -> Engine:
        key = evaluation, device, outputs
        if key not in self._engines:
            learner = make_learner(self.config.learner, self.model(outputs, device), self.loss, changes)
            method = make_method(self.config, learner, self.shapes.model_inputs, device)
            self._engines[key] = Engine(learner, method, device)
        return self._engines[key]

    def evaluation_outputs(self, engine: Engine) -> int:
        """The outputs of the model of evaluation: as many as its tasks have classes where the learner makes a head of
        its own (and no weights are loaded), else as many as in training."""
        free = engine.learner.any_ways and not self.config.model.weights
        return self.evaluation_source.outputs if free else self.shapes.outputs

    def evaluator(self, engine: Engine) -> Evaluator:
        """Measures tasks of evaluation; `engine` is of evaluation."""
        own = self.config.evaluation
        return Evaluator(
            engine, self.evaluation_source, self.metrics(self.evaluation_source.outputs), own.transductive,
            own.scratch_steps, own.scratch_lr, self._last_step or 0, self.own_baselines,
        )  # fmt: skip

    @cached_property
    def measure(self) -> Measure:
        """What tasks are judged by. Raises InputError where the learner's own measures leave no room for what the job
        asks for."""
        own, learner = self.config.evaluation, self.engine("cpu").learner
        if not learner.measures:
            if own.metrics and own.better:
                return Measure(next(iter(own.metrics)), own.better)
            return Measure.of({"accuracy": 0} if self.shapes.classification else {})
        judged = f"learner {self.config.learner.name} is judged by its own measures ({', '.join(learner.measures)})"
        if taken := [name for name in learner.measures if Measure.is_taken(name)]:
            raise InputError(f"learner {self.config.learner.name} calls a measure {taken[0]!r}, which results call "
                             "something else: rename it")  # fmt: skip
        if own.metrics:
            raise InputError(f"evaluation.metrics: {judged}: leave them out")
        if self.config.task.steps_per_round:
            raise InputError(f"task.steps_per_round: {judged}, and rounds by the loss of queries: leave it out")
        return Measure(*next(iter(learner.measures.items())))

    @cached_property
    def own_baselines(self) -> dict[str, Callable[..., Any]]:
        """The user's baselines, by the name of the function."""
        return {
            name.partition(":")[2]: self._own("evaluation.baselines", name)
            for name in self.config.evaluation.baselines or []
            if ":" in name
        }

    @cached_property
    def own_figures(self) -> dict[str, Callable[..., Any]]:
        """The user's figures of a task, by name."""
        return {
            name: self._own(f"evaluation.figures.{name}", code) for name, code in self.config.evaluation.figures.items()
        }

    def _own(self, key: str, name: str) -> Callable[..., Any]:
        found = resolve(name)
        if not callable(found):
            raise InputError(f"{key}={name} is a {type(found).__name__}: it must be a function")
        return found

    def metrics(self, ways: int | None = None) -> dict[str, Loss]:
        """What evaluation measures of outputs, the measure of success first: the user's own, then accuracy where there
        are classes, how sure the learner was, and the loss. Of more outputs than `ways` the first count: the others are
        no class of the task."""
        codes = self.config.evaluation.metrics
        own = {name: _own_metric(name, self._own(f"evaluation.metrics.{name}", code)) for name, code in codes.items()}
        if not self.shapes.classification:
            return {**own, "loss": self.loss}

        def among_ways(metric: Loss) -> Loss:
            return lambda outputs, target: metric(outputs[:, :ways], target)

        first = {name: among_ways(metric) for name, metric in own.items()}
        return {**first, "accuracy": among_ways(accuracy), "confidence": among_ways(confidence), "loss": self.loss}

    def worker(self, constants: Mapping[str, np.ndarray] | None = None) -> Worker:
        """A worker on the workers' device. `constants`: frozen weights and buffers to take from the driver."""
        engine = self.engine()
        later = self.evaluation_engine(outputs=self.evaluation_outputs(engine))
        example = self.source(TaskId("train", 0, 0))
        for each in (engine, later):
            each.settle(example)
            if constants is not None:
                each.learner.model.load_constants(constants)
        config, size = self.config, chunk_size(self.config, engine)
        return Worker(
            engine,
            self.source,
            self.evaluator(later),
            config.seed,
            config.meta_steps,
            aggregation(config, engine),
            size,
        )

    def worker_factory(self, constants: Mapping[str, np.ndarray]) -> Callable[[], Worker]:
        """A function that builds a worker in any process, with modules found where this process finds them."""
        name = self.dataset.path.name if self.dataset else None
        return partial(_worker_elsewhere, self.config, constants, str(Path.cwd()), name)

    def combinations(self, split: Split) -> int | None:
        """Of how many different sets of classes (groups, where one is the task) tasks of training, or of evaluation,
        can be; None where the source does not say."""
        source = self.source if split == "train" else self.evaluation_source
        return source.combinations(split) if isinstance(source, TableSource) else None

    def training_groups(self) -> int | None:
        """How many groups training tasks are made of: classes, or, where a group is the task, tasks; None where the
        source does not say."""
        return sum(map(len, self.source.pools("train"))) if isinstance(self.source, TableSource) else None

    def few_tasks(self, split: Split, tasks: int) -> str:
        """A sentence where so many tasks of a split draw the same classes again and again, else nothing."""
        found = self.combinations(split)
        if found is None or found >= tasks:
            return ""
        what = "group" if isinstance(self.evaluation_source, ValueSource) else "set of classes"
        drawn = what if found == 1 else {"group": "groups", "set of classes": "sets of classes"}[what]
        return (
            f"{tasks} tasks of split {split!r} are drawn from only {found} different {drawn}: their interval is about "
            "other rows of these and understates how far results for new ones may lie apart"
        )

    def optimization(self, engine: Engine) -> Optimization:
        """The server's side of the configuration."""
        settings = self.config.optimizer.model_dump(exclude={"delay", "max_staleness"})  # which are the trainer's
        return Optimization(
            settings.pop("name"), meta_lr=self.config.meta_lr, meta_steps=self.config.meta_steps,
            reference_batch=self.config.batch_size(1), statistics=engine.num_statistics, **settings,
        )  # fmt: skip

    def baselines(self) -> list[str]:
        """The baselines of evaluation that suit the job. Raises InputError where one asked for does not."""
        given, known_loss = self.config.evaluation.baselines, self.config.loss in ("auto", *LOSSES)
        asked = None if given is None else [name.partition(":")[2] or name for name in given]
        shapes, kind = self.shapes, type(self.engine("cpu").learner)
        source = self._source(evaluation=True) if self.dataset is not None else None
        shared = isinstance(source, LabelledSource) and bool(source.labels)
        chosen = choose_baselines(
            asked, shapes.classification, known_loss, shapes.tokens, shapes.outputs, shared, kind, self.own_baselines
        )
        if "joint" in chosen:
            self.check_joint()
        return chosen

    def check_joint(self) -> None:
        """Raise InputError where classes, or the model, do not allow the joint baseline."""
        if not self.shapes.classification:
            return
        if not isinstance(self.source, ClassSource):
            raise InputError(
                "evaluation.baselines: joint needs classes that are the same in every task (scheme classes)"
            )
        if self.config.model.name not in (*MODELS, "auto"):
            raise InputError("evaluation.baselines: joint, for classes, needs a built-in model, to choose its outputs")
        if self.config.model.weights:
            raise InputError(
                "evaluation.baselines: joint, for classes, trains its own weights: leave model.weights out"
            )

    def joint(self, engine: Engine) -> Joint:
        """The joint baseline; `engine` is the run's."""
        config, classification, measured = self.config, self.shapes.classification, engine.learner.measures
        self.check_joint()

        def plain(outputs: int, **options: Any) -> Engine:
            model = self.fresh_model(outputs)
            if measured:
                learner = replace(engine.learner, model=model, **options)
            else:
                learner = MAML(model=model, loss=self.loss, **options)
            return Engine(learner, make_method(config, learner, self.shapes.model_inputs).kind)

        rate, steps = fine_tuning(config.evaluation, classification, engine.learner)
        return Joint(
            config.evaluation, config.seed, self.source, self.evaluator(engine), classification,
            outputs=self.evaluation_source.outputs if classification else self.shapes.outputs,
            make_model=self.fresh_model, make_engine=plain, inner_lr=rate, inner_steps=steps,
            chunk_size=partial(chunk_size, config),
            last_step=self._last_step,
        )  # fmt: skip

    @property
    def _last_step(self) -> int | None:
        """Online, the meta-step before which all tasks have arrived."""
        return self.config.meta_steps - 1 if self.config.task.steps_per_round else None

    def evaluation(self, engine: Engine, baselines: Sequence[str]) -> Evaluation:
        """The full evaluation; `engine` is the run's."""
        joint = self.joint(engine) if "joint" in baselines else None
        size = chunk_size(self.config, engine)
        return Evaluation(
            self.config.evaluation, self._caption(engine), self.measure, engine.learner, size, baselines, joint
        )

    def _caption(self, engine: Engine) -> dict[str, Any]:
        """How the figures come about, in the words of a paper's table."""
        config, own, task, learner = self.config, self.config.evaluation, self.config.task, engine.learner
        sizes: dict[str, Any] = {"source": config.data.source}
        if not config.data.source:
            sizes = {"ways": own.ways or task.ways} if self.shapes.classification else {}
            sizes |= {"shots": own.shots or task.shots, "queries": own.queries or task.queries}
        options = {k: value for k, value in config.learner.options.items() if k not in ("inner_steps", "inner_lr")}
        units = self.shapes.target_units
        scaled = any(np.any(np.not_equal(unit["scale"], 1)) or np.any(unit["offset"]) for unit in units)
        rate = "learned" if learner.learned_rates else own.inner_lr or learner.inner_lr
        return {
            "learner": config.learner.name,
            **options,
            "split": own.split,
            "tasks": own.test_tasks,
            **sizes,
            **({"order": task.order} if task.order != "random" else {}),
            **({"target_unit": "as standardized"} if scaled else {}),
            "inner_steps": learner.inner_steps if own.inner_steps is None else own.inner_steps,
            **({} if "inner_steps" in learner.refused else {"inner_lr": rate}),
            "transductive": own.transductive,
            "seed": config.seed,
        }


def _own_metric(name: str, metric: Callable[..., Any]) -> Loss:
    """A user's metric, NaN of a task whose outputs are not finite: what it makes of these is no figure. Raises
    InputError where it fails, or gives anything but one number."""

    def measured(outputs: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        try:
            value = metric(outputs, *targets)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"evaluation.metrics.{name} fails ({type(error).__name__}: {error}): it is called with outputs "
                "and targets as tensors, and must stay inside torch, or the job set engine.kind=loop"
            ) from error
        if not isinstance(value, torch.Tensor) or value.ndim:
            what = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise InputError(f"evaluation.metrics.{name} gave {what}: it must give one number of a task, as a tensor "
                             "without axes (a mean over its query examples)")  # fmt: skip
        return torch.where(outputs.isfinite().all(), value, torch.nan)

    return measured


def _worker_elsewhere(
    config: Config, constants: Mapping[str, np.ndarray], search_path: str, data_name: str | None
) -> Worker:
    if search_path not in sys.path:
        sys.path.insert(0, search_path)
    return Job(config, data_name=data_name).worker(constants)
