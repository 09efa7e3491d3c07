"""From a `Config` to the objects of a run. Nothing below this floor knows `Config`."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch.nn.parameter import is_lazy

from metadist.config.schema import Config
from metadist.core.errors import InputError
from metadist.core.task import TaskId
from metadist.data import Dataset, cached, open_dataset
from metadist.data.online import Stream
from metadist.data.sources import ClassSource, LabelledSource, Source, ValueSource
from metadist.engine import Engine
from metadist.evaluation.baselines import is_text
from metadist.fleet.server import Optimization
from metadist.fleet.worker import Protocol, Worker
from metadist.learners import INNER_OPTIMIZERS, LEARNERS, InnerOptimizer, Learner
from metadist.models import MODELS, Model
from metadist.models.losses import LOSSES, Loss, accuracy, confidence
from metadist.run.auto import aggregation, chunk_size, make_method, worker_device
from metadist.run.plugins import call, resolve


def open_data(config: Config) -> Dataset | None:
    """The dataset a job names (a built-in family is built first), or None where it brings its own source."""
    data = config.data
    if data.source:
        return None
    if data.family:
        return open_dataset(cached(data.family, data.options))
    assert data.path
    if not Path(data.path).is_dir():
        raise InputError(
            f"there is no data in {data.path}: make it with `metadist data ... --out {shlex.quote(data.path)}` "
            "(see `metadist data --help`), or set data.path to where it is"
        )
    return open_dataset(data.path)


def make_source(config: Config, evaluation: bool = False) -> Source:
    """Where the tasks of training, or of evaluation with its own ways, shots and queries, come from."""
    source, rounds = _make_source(config, evaluation), config.task.steps_per_round
    return Stream(_make_source(config, False), source, rounds, config.seed) if rounds else source


def _make_source(config: Config, evaluation: bool) -> Source:
    dataset = open_data(config)
    if dataset is None:
        assert config.data.source
        return call(config.data.source, resolve(config.data.source), {"seed": config.seed, **config.data.options})
    task, own = config.task, config.evaluation
    ways = own.ways if evaluation and own.ways else task.ways
    shots = own.shots if evaluation and own.shots else task.shots
    queries = own.queries if evaluation and own.queries else task.queries
    scheme = dataset.kind if task.scheme == "auto" else task.scheme
    if scheme == "classes":
        return ClassSource(dataset.splits, shots, queries, config.seed, ways=ways, within_parent=task.within_parent)
    if scheme == "labelled":
        return LabelledSource(
            dataset.splits, shots, queries, config.seed, ways=ways, permute_labels=task.permute_labels
        )
    return ValueSource(dataset.splits, shots, queries, config.seed)


class Shapes(NamedTuple):
    """What a model and a loss need to know of the tasks; it travels in the checkpoint, so a model needs no data."""

    inputs: list[list[int]]  # shape of each input of one example
    tokens: bool  # the inputs are token numbers and their mask
    vocabulary_size: int | None
    outputs: int
    classification: bool
    input_units: Sequence[dict[str, Any]] = ()  # of each input: the "dtype" it is stored in, "offset" and "scale"
    target_units: Sequence[
        dict[str, Any]
    ] = ()  # of each target likewise: what a task holds is (stored - offset) * scale
    dtypes: Sequence[str] = ()  # of each input as a task holds it, floating point ones as float32


def task_shapes(config: Config, source: Source) -> Shapes:
    """Read off the first training task, which also shows that there is one. Raises InputError where there is not."""
    support, query = source(TaskId("train", 0, 0))
    if len(support.inputs) != len(query.inputs) or len(support.targets) != len(query.targets):
        raise InputError("the source gives support and query sets with different fields")
    dataset = open_data(config)
    return Shapes(
        inputs=[list(array.shape[1:]) for array in support.inputs],
        tokens=is_text(support.inputs),
        vocabulary_size=dataset.metadata["extra"].get("vocabulary_size") if dataset else None,
        outputs=source.outputs,
        classification=len(support.targets) == 1 and np.issubdtype(support.targets[0].dtype, np.integer),
        input_units=_units(dataset, "input"),
        target_units=_units(dataset, "target"),
        dtypes=[np.dtype("float32").name if x.dtype.kind == "f" else x.dtype.name for x in map(_numpy, support.inputs)],
    )


def _numpy(array: Any) -> np.ndarray:
    return np.asarray(array.cpu() if isinstance(array, torch.Tensor) else array)


def _units(dataset: Dataset | None, role: str) -> list[dict[str, Any]]:
    fields = [field for field in dataset.fields if field.role == role] if dataset else []
    columns = dataset.metadata["extra"].get("standardized", {}) if dataset else {}
    return [{"dtype": f.dtype, "offset": f.offset, "scale": f.scale, **columns.get(f.name, {})} for f in fields]


def make_model(config: Config, shapes: Shapes) -> Model:
    """The model with initial weights drawn from the run's seed (or read from `model.weights`)."""
    name, options = config.model.name, config.model.options
    if name == "auto":
        image = len(shapes.inputs[0]) == 3 and min(shapes.inputs[0][1:]) >= 8
        name = "bag" if shapes.tokens else "conv4" if image else "mlp"
    torch.manual_seed(config.seed)
    if name in MODELS:
        known = {"input_shapes": shapes.inputs, "outputs": shapes.outputs}
        if name == "bag" and shapes.vocabulary_size:
            known["vocabulary_size"] = shapes.vocabulary_size
        module = call(f"model {name}", MODELS[name], {**known, **options}, hidden=tuple(known))
    else:
        found = resolve(name, MODELS)
        if isinstance(found, type) and not issubclass(found, torch.nn.Module):
            raise InputError(f"model.name={name} is no torch.nn.Module class, nor a function that returns one")
        module = call(name, found, options)
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"model.name={name} gave a {type(module).__name__}; it must give a torch.nn.Module")
    _materialise(module, shapes)
    if config.model.weights:
        _load_weights(module, config.model.weights)
    return Model(module)


def _materialise(module: torch.nn.Module, shapes: Shapes) -> None:
    """Give lazy layers their weights, drawn from the run's seed, by one call on examples of zeros."""
    if any(map(is_lazy, [*module.parameters(), *module.buffers()])):
        dtypes = shapes.dtypes or ["float32"] * len(shapes.inputs)
        examples = [torch.from_numpy(np.zeros((2, *s), d)) for s, d in zip(shapes.inputs, dtypes, strict=True)]
        with torch.no_grad():
            module(*examples)


def make_loss(config: Config, shapes: Shapes) -> Loss:
    """The loss of the job; `auto` is cross-entropy for whole-number targets, else the mean squared error."""
    suited = "cross_entropy" if shapes.classification else "mse"
    if config.loss not in ("auto", *LOSSES):
        return cast(Loss, resolve(config.loss, LOSSES))
    if config.loss not in ("auto", suited):
        kind = "classes" if shapes.classification else "values"
        raise InputError(f"loss={config.loss} does not suit tasks whose targets are {kind}: take {suited}, or auto")
    return LOSSES[suited]


def make_engine(config: Config, shapes: Shapes, device: str | None = None, **changes: Any) -> Engine:
    """The engine of a run, on the workers' kind of device or another; `changes` replace learner options."""
    model, name = make_model(config, shapes), config.learner.name
    kind, preset, _ = LEARNERS[name] if name in LEARNERS else (resolve(name, LEARNERS), {}, "")
    for option, value in config.learner.options.items():
        if isinstance(preset.get(option), bool) and value != preset[option]:
            raise InputError(f"learner {name} is the one with {option}={preset[option]}: leave it out, or name another")
    if not (isinstance(kind, type) and issubclass(kind, Learner)):
        raise InputError(f"learner.name={name} is not a metadist.Learner class")
    given = [f"learner.{option}" for option in kind.refused if option in config.learner.options]
    given += [f"evaluation.{option}" for option in kind.refused if option in changes]
    if given:
        reason = kind.refused[given[0].partition(".")[2]]
        remedy = " ".join(f"{key}=null" for key in given)
        raise InputError(
            f"learner {name} takes no {', '.join(given)}, {reason}: leave out, or, where a job has it, {remedy}"
        )
    options = {"model": model, "loss": make_loss(config, shapes), **preset, **config.learner.options}
    if "inner_optimizer" in options:
        options["inner_optimizer"] = make_inner_optimizer(options["inner_optimizer"])
    learner = cast(
        Learner, call(f"learner {name}", kind, options, hidden=("model", "loss", "inner_optimizer", *kind.refused))
    )
    try:
        learner, planned = replace(learner, **changes), worker_device(config)
    except ValueError as error:
        raise InputError(f"evaluation: learner {name}: {error}") from None
    method = make_method(config, learner, shapes.inputs)
    if device not in (None, planned):  # elsewhere than on the workers it only has to compute, not fast
        method = replace(method, compiled=False, captured=False, autocast=False)
    return Engine(learner, method, device or planned)


def make_inner_optimizer(given: Any) -> InnerOptimizer:
    """What `learner.inner_optimizer` says: a name, or a mapping of `name` and its options. Raises InputError."""
    options = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"learner.inner_optimizer={given!r} must be a name, or a mapping with one")
    if name in INNER_OPTIMIZERS:
        return call(f"inner optimizer {name}", INNER_OPTIMIZERS[name], options)
    rule = "it must be a class with methods begin(weight) and step(weight, gradient, slots, rate, k), see the README"
    try:
        made = call(f"inner optimizer {name}", resolve(name, INNER_OPTIMIZERS), options)
    except InputError as error:
        raise InputError(f"{error}; {rule}" if ":" in name else str(error)) from None
    if not (callable(getattr(made, "begin", None)) and callable(getattr(made, "step", None))):
        raise InputError(f"inner optimizer {name} gave a {type(made).__name__}: {rule}")
    return cast(InnerOptimizer, made)


def make_worker(
    config: Config, constants: Mapping[str, np.ndarray] | None = None, search_path: str | None = None
) -> Worker:
    """A worker for a run. `constants` are frozen weights and buffers to take from the driver; `search_path` is where
    the driver finds the user's modules."""
    if search_path and search_path not in sys.path:
        sys.path.insert(0, search_path)
    source, own = make_source(config), make_source(config, evaluation=True)
    shapes = task_shapes(config, source)
    engine = make_engine(config, shapes)
    later = make_evaluation_engine(config, judged_shapes(config, shapes, engine.learner, own))
    example = source(TaskId("train", 0, 0))
    for each in (engine, later):
        each.settle(example)
        if constants is not None:
            each.learner.model.load_constants(constants)
    measures, judged = metrics(config, shapes, own.outputs), config.evaluation
    protocol = Protocol(later, own, measures, judged.transductive, judged.scratch_steps, judged.scratch_lr)
    size = chunk_size(config, engine)
    return Worker(engine, source, protocol, config.seed, config.meta_steps, aggregation(config, engine), size)


def judged_shapes(config: Config, shapes: Shapes, learner: Learner, source: Source) -> Shapes:
    """With outputs for the classes of evaluation, to train from scratch, where the learner does without the model's."""
    free = learner.any_ways and not config.model.weights
    return shapes._replace(outputs=source.outputs) if free else shapes


def make_evaluation_engine(config: Config, shapes: Shapes, device: str | None = None) -> Engine:
    """The engine with the inner steps and rate of evaluation."""
    changes = {"inner_steps": config.evaluation.inner_steps, "inner_lr": config.evaluation.inner_lr}
    engine = make_engine(
        config, shapes, device, **{name: value for name, value in changes.items() if value is not None}
    )
    if config.evaluation.inner_lr is not None and engine.learner.learned_rates:
        raise InputError(f"evaluation.inner_lr: learner {config.learner.name} learns its rates: leave it out")
    return engine


def worker_factory(config: Config, constants: Mapping[str, np.ndarray]) -> Callable[[], Worker]:
    """What a fleet calls, in whatever process, to build its workers."""
    return partial(make_worker, config, constants, str(Path.cwd()))


def metrics(config: Config, shapes: Shapes, ways: int | None = None) -> dict[str, Loss]:
    """What evaluation measures, the measure of success first: accuracy where there are classes, then how sure the
    learner was, and the loss. Of more outputs than `ways` the first count: the others are no class of the task."""
    loss = make_loss(config, shapes)

    def among_ways(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return accuracy(outputs[:, :ways], target)

    def sure(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return confidence(outputs[:, :ways], target)

    return {"accuracy": among_ways, "confidence": sure, "loss": loss} if shapes.classification else {"loss": loss}


def make_optimization(config: Config, engine: Engine) -> Optimization:
    """The server's side of the configuration."""
    own = config.optimizer.model_dump()
    optimizer, given = own.pop("name"), {"meta_lr": config.meta_lr, "meta_steps": config.meta_steps}
    del own["delay"], own["max_staleness"]  # are the trainer's
    return Optimization(
        optimizer, **given, reference_batch=config.batch_size(1), statistics=engine.num_statistics, **own
    )


def _load_weights(module: torch.nn.Module, path: str) -> None:
    if not Path(path).is_file():
        raise InputError(f"model.weights={path} is not a safetensors file that can be read (no regular file)")
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"model.weights={path} is not a safetensors file that can be read ({error})") from None
    try:
        module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    except RuntimeError as error:
        raise InputError(f"model.weights={path} does not fit the model: {' '.join(str(error).split())}") from None
