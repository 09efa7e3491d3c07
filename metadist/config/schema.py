"""Everything a job can say, with its default, allowed range and meaning."""

import re
import warnings
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from metadist.core.errors import did_you_mean
from metadist.core.measure import BUILT_IN, Measure

BUILT_IN_MODELS = ("mlp", "conv4", "resnet12", "bag", "encoder", "gaussian_policy", "siren")
LEARNER_OPTIONS = ("inner_lr", "inner_steps", "first_order")
"""What `metadist.models` and every `metadist.Learner` have, named here because settings stand below them."""

Count = Annotated[int, Field(ge=1, le=10**12)]
Tasks = Annotated[int, Field(ge=1, le=10**7)]
Workers = Annotated[int, Field(ge=1, le=100_000)]
Natural = Annotated[int, Field(ge=0, le=10**12)]
Rate = Annotated[float, Field(gt=0)]
BASELINES = (
    "nearest_class_mean", "logistic_regression", "tfidf_logistic_regression", "support_mean", "ridge", "pooled",
    "from_scratch", "joint", "initial",
)  # fmt: skip
FIGURES = ("adaptation_curve", "training_curve", "scaling", "task")
OWN_CODE = re.compile(r"[\w.]+:\w+")


def _known_or_own(name: str) -> str:
    if name not in BASELINES and not OWN_CODE.fullmatch(name):
        hint = did_you_mean(name.lower(), BASELINES) or f"; known: {', '.join(BASELINES)}"
        raise PydanticCustomError("baseline", "neither built in nor of the form module:callable{hint}", {"hint": hint})
    return name


BaselineName = Annotated[str, AfterValidator(_known_or_own)]
Code = Annotated[str, Field(pattern=rf"^{OWN_CODE.pattern}$")]
Label = Annotated[str, Field(pattern=r"^[a-zA-Z]\w{0,99}$")]
Place = Annotated[str, Field(pattern=r"^[^\x00]+$")]


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _numbers_are_no_booleans(cls, value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        made = read(value)
        if isinstance(value, bool) and not isinstance(made, bool):
            raise PydanticCustomError("number", "Input should be a number, not true or false")
        return made


class Open(BaseModel):
    """A frozen group whose other keys belong to what `name` names and are checked against it."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are not the schema's own; one set to null is as if it were not there."""
        return {key: value for key, value in (self.model_extra or {}).items() if value is not None}


class DataConfig(Section):
    path: Place | None = Field(None, description="directory made by `metadist data ...`, or a URI it is fetched from")
    family: Literal["digits", "letters", "sinusoid"] | None = Field(
        None, description="built-in data, built once into the cache"
    )
    source: str | None = Field(None, description="your own source of tasks, `module:Class`")
    options: dict[str, Any] = Field({}, description="arguments of the family or of the source")

    @model_validator(mode="after")
    def _one_of_them(self) -> "DataConfig":
        if sum(given is not None for given in (self.path, self.family, self.source)) != 1:
            raise ValueError("set exactly one of data.path, data.family and data.source")
        return self


class TaskConfig(Section):
    scheme: Literal["auto", "classes", "labelled", "values"] = Field(
        "auto", description="classes: groups are the classes; labelled: a group is the task, rows bring labels; "
        "values: a group is the task, rows bring numbers; auto: what the data was imported as"
    )  # fmt: skip
    ways: Annotated[int, Field(ge=2)] = Field(5, description="N, classes per task (classification)")
    shots: Count = Field(1, description="K, support examples per class, or per task in regression")
    queries: Count = Field(15, description="Q, query examples per class, or per task in regression")
    within_parent: bool = Field(False, description="classes: draw a task's classes from one parent")
    steps_per_round: Count | None = Field(
        None, description="online: tasks arrive one after another, so many meta-steps apart; each is drawn from then on"
    )
    order: Literal["random", "time", "window"] = Field(
        "random", description="time: support examples are earlier than query examples, in a table imported with "
        "--time; window: and are rows that follow one another (scheme values), to forecast after a short history"
    )  # fmt: skip
    permute_labels: bool = Field(True, description="labelled: number a task's labels in random order")


class ModelConfig(Open):
    name: str = Field(
        "auto", description=f"{', '.join(BUILT_IN_MODELS)}, or `module:callable`; further keys are its arguments"
    )
    weights: Place | None = Field(
        None, description="safetensors file (path or URI) of initial weights, by parameter name; what it does not fill "
        "and what of it is not used is said"
    )  # fmt: skip
    weight_names: dict[str, str | None] = Field(
        {}, description="names, or patterns with *, of that file: the model's names for them; null leaves them out"
    )


class LearnerConfig(Open):
    name: str = Field("maml", description="see `metadist learners`, or `module:Class`; further keys are its options")


class OptimizerConfig(Section):
    name: Literal["adam", "adamw", "sgd"] = Field("adam", description="the outer optimizer")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="of meta_lr over meta_steps")
    warmup_steps: Natural = 0
    final_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="where cosine and linear end")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="sgd only")
    clip_norm: Rate | None = Field(None, description="largest norm of the mean meta-gradient")
    clip_value: Rate | None = Field(None, description="largest magnitude of each of its elements, applied first")
    delay: Literal[0, 1] = Field(
        0, description="1: gradients are of the weights one meta-step before, so that workers never wait for the server"
    )
    max_staleness: Natural = Field(
        0, description="asynchronous: gradients may be of weights up to so many meta-steps old; not bit-identical"
    )
    batch_rule: Literal["none", "linear", "sqrt"] = Field(
        "none", description="with tasks_per_worker: how meta_lr, stated for one worker's tasks, grows with the batch"
    )


class EngineConfig(Section):
    kind: Literal["auto", "loop", "vmap"] = Field("auto", description="loop over tasks, or all of a chunk at once")
    differentiation: Literal["auto", "unroll", "remat"] = Field(
        "auto",
        description="through the inner loop: keep all steps, or compute them again with memory that does not grow",
    )
    keep: Literal["all", "sqrt"] = Field("all", description="remat: fast weights kept of all steps or of few")
    compile: bool = Field(False, description="compile the whole meta-gradient (5 to 25 s at the start)")
    cuda_graphs: bool = Field(
        False, description="GPUs: launch a task's operations at once, where shapes are fixed; not yet run on a GPU"
    )
    autocast: bool = Field(
        False, description="GPUs: bfloat16 in the network; weights and gradients stay float32; not yet run on a GPU"
    )
    chunk_size: Count | None = Field(
        None, description="tasks per unit of work; default <= 4 for loop, 8 or 32 for vmap"
    )
    aggregate: Literal["auto", "task", "chunk"] = Field(
        "auto", description="send per-task gradients (diagnostics), or their sum per chunk (less traffic)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda when workers have a GPU")
    gradient_check: bool = Field(
        True, description="before the run, one task's meta-gradient against finite differences; false where a "
        "derivative is not one on purpose (a straight-through estimator, stopped gradients)"
    )  # fmt: skip

    @field_validator("differentiation", mode="before")
    @classmethod
    def _no_longer(cls, value: Any) -> Any:
        if value == "adjoint":  # in jobs and saved runs of version 0.1
            raise ValueError(
                "adjoint is no longer there: set engine.differentiation=remat, which is faster and as exact; a run "
                "trained with adjoint needs the metadist that it was trained with"
            )
        return value


class FleetConfig(Section):
    backend: Literal["ray", "local", "auto"] = Field(
        "ray", description="actors, or everything in this process; auto: this process where a network is so small that "
        "a step is shorter than what Ray adds to it, and neither workers nor a cluster are asked for"
    )  # fmt: skip
    address: str | None = Field(None, description="Ray cluster; default RAY_ADDRESS, else a local one is started")
    min_workers: Workers = Field(1, description="below this the run waits and says so")
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0, description="fractions share a GPU; not yet run on a GPU")
    servers: Workers = Field(1, description="actors that theta is cut over, where it is large; the bits are the same")
    threads_per_worker: Workers = Field(1, description="torch threads; part of the run's identity")
    mixed_devices: bool = Field(False, description="accept unequal machines; the run is then not bit-identical")
    resources: dict[str, Rate] = Field({}, description="custom Ray resources each worker asks for")
    max_losses: Natural = Field(
        20, description="workers lost within ten minutes that end the run (or 4 times as many as it should have), but "
        "those of nodes taken away with notice do not count"
    )  # fmt: skip
    max_out_of_memory: Natural = Field(3, description="likewise, those that ran out of memory")
    max_errors: Natural = Field(
        0, description="likewise, exceptions in a source, model or loss that may not come again, as of a file server"
    )
    first_result_s: Annotated[float, Field(gt=0)] = Field(
        900, description="a worker without its first result by then counts as hung; later 30 times the usual is enough"
    )


class EvaluationConfig(Section):
    every: Natural = Field(100, description="meta-steps between validations; 0: none")
    tasks: Tasks = Field(200, description="validation tasks, the same each time")
    test_tasks: Tasks = Field(600, description="tasks of the final evaluation")
    split: Literal["train", "validation", "test"] = "test"
    ways: Annotated[int, Field(ge=2)] | None = Field(None, description="default: as in training")
    shots: Count | None = Field(None, description="default: as in training")
    queries: Count | None = Field(None, description="default: as in training")
    inner_steps: Natural | None = Field(None, description="default: as in training")
    inner_lr: Rate | None = Field(None, description="default: as in training")
    transductive: bool = Field(
        True, description="query examples share one batch; false: each is predicted with the support set only"
    )
    metrics: dict[Label, Code] = Field(
        {}, description="of your own, `name: module:callable` of (outputs, *targets); the first is the measure of "
        "success: of the best checkpoint, patience and the verdict"
    )  # fmt: skip
    better: Literal["higher", "lower"] | None = Field(
        None, description="on which side the first of your own metrics is better"
    )
    figures: dict[Label, Code] = Field(
        {}, description="of your own, `name: module:callable` of (learner, theta, fasts, task), which gives a figure "
        "of matplotlib: drawn of the first task, as NAME.png"
    )  # fmt: skip
    baselines: list[BaselineName] | None = Field(
        None, description=f"of {', '.join(BASELINES)}, or `module:callable` of a task; default: those that suit the "
        "kind of task (joint: not for classes, where it takes long)"
    )  # fmt: skip
    baseline_tasks: Natural = Field(100, description="tasks for from_scratch, which is slow; the others use all")
    scratch_lr: Rate = Field(0.01, description="Adam's rate in the from-scratch baseline")
    scratch_steps: Count = Field(50, description="Adam steps of the from-scratch baseline")
    joint_lr: Rate = Field(1e-3, description="Adam's rate in the joint baseline")
    joint_steps: Count = Field(2000, description="training steps of the joint baseline")
    joint_inner_lr: Rate | None = Field(
        None, description="rate of its fine-tuning of all weights by plain gradient descent; default: inner_lr of a "
        "learner that does the same, else 0.4 for classes and 0.01 for values"
    )  # fmt: skip
    joint_inner_steps: Natural | None = Field(
        None, description="steps of its fine-tuning; default: those of the learner, 10 where it has none"
    )
    patience: Count | None = Field(None, description="stop after this many validations without improvement")

    @model_validator(mode="after")
    def _own_metrics(self) -> "EvaluationConfig":
        named = [name.partition(":")[2] or name for name in self.baselines or []]
        if twice := [name for name in named if ":" not in name and named.count(name) > 1]:
            raise ValueError(f"baselines has {twice[0]} twice: name it once, or call a function of your own otherwise")
        if bool(self.metrics) != bool(self.better):
            raise ValueError(
                "metrics of your own need evaluation.better=higher or =lower, on which side the first of them is better"
                if self.metrics else "better is about metrics of your own, and there are none"
            )  # fmt: skip
        if ours := [name for name in self.metrics if name in BUILT_IN or Measure.is_taken(name)]:
            raise ValueError(f"{ours[0]} is metadist's own metric, or another of its results: call yours otherwise")
        if ours := [name for name in self.baselines or [] if name.partition(":")[2] in BASELINES]:
            raise ValueError(f"{ours[0]} is called like a baseline of metadist's own: call the function otherwise")
        if taken := [name for name in self.figures if name in FIGURES]:
            raise ValueError(f"{taken[0]}.png is a figure of metadist's own: call yours otherwise")
        return self


class CheckpointConfig(Section):
    every: Count = Field(200, description="meta-steps")
    every_s: Rate = Field(300, description="and at least this often, seconds")
    keep_last: Count = 3
    location: Place | None = Field(None, description="local path or URI (s3://...); default: RUN/checkpoints")


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # `register` is a method of the class too, which nobody calls

    class TrackingConfig(Section):
        mlflow: bool = True
        uri: str | None = Field(
            None, description="default MLFLOW_TRACKING_URI, else SQLite beside the run directories (not at a URI)"
        )
        experiment: str = "metadist"
        run_name: str | None = None
        register: str | None = Field(
            None,
            min_length=1,
            description="name under which the best model is registered in MLflow, with the alias best",
        )
        log_every: Count = Field(10, description="meta-steps between metrics")


class Config(Section):
    """A whole run. `metadist config show JOB.yaml` prints one resolved."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    run_dir: Place | None = Field(
        None, description="path or URI (s3://bucket/runs/NAME); default: runs/NAME of the job file"
    )
    num_workers: Workers = 2
    meta_steps: Count = 1000
    meta_batch_size: Tasks | None = Field(
        None, description="tasks per meta-step, whatever the number of workers; default 32"
    )
    tasks_per_worker: Tasks | None = Field(
        None, description="instead: the meta-batch is this many tasks for each worker the run should have"
    )
    meta_lr: Rate = 1e-3
    max_time_s: Rate | None = Field(None, description="save and stop after this long")
    loss: str = Field("auto", description="cross_entropy, mse or `module:callable`; auto: by the kind of task")
    data: DataConfig
    task: TaskConfig = TaskConfig()  # pyright: ignore[reportCallIssue]
    model: ModelConfig = ModelConfig()  # pyright: ignore[reportCallIssue]
    learner: LearnerConfig = LearnerConfig()  # pyright: ignore[reportCallIssue]
    optimizer: OptimizerConfig = OptimizerConfig()  # pyright: ignore[reportCallIssue]
    engine: EngineConfig = EngineConfig()  # pyright: ignore[reportCallIssue]
    fleet: FleetConfig = FleetConfig()  # pyright: ignore[reportCallIssue]
    evaluation: EvaluationConfig = EvaluationConfig()  # pyright: ignore[reportCallIssue]
    checkpoint: CheckpointConfig = CheckpointConfig()  # pyright: ignore[reportCallIssue]
    tracking: TrackingConfig = TrackingConfig()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.meta_batch_size and self.tasks_per_worker:
            raise ValueError("set meta_batch_size (fixed batch) or tasks_per_worker (grows with workers), not both")
        if self.fleet.min_workers > self.num_workers:
            raise ValueError(f"fleet.min_workers={self.fleet.min_workers} is more than num_workers={self.num_workers}")
        if self.optimizer.delay and self.optimizer.max_staleness:
            raise ValueError(
                "set optimizer.delay (same bits always) or optimizer.max_staleness (asynchronous), not both"
            )
        if self.optimizer.max_staleness and self.fleet.backend == "local":
            raise ValueError("optimizer.max_staleness needs fleet.backend=ray: in one process nothing is asynchronous")
        if self.fleet.gpus_per_worker > 1 and self.fleet.gpus_per_worker % 1:
            raise ValueError(f"fleet.gpus_per_worker={self.fleet.gpus_per_worker} must be whole, or a part of one GPU")
        if self.engine.device == "cuda" and self.fleet.backend != "local" and not self.fleet.gpus_per_worker:
            raise ValueError("engine.device=cuda needs fleet.gpus_per_worker above 0 (such as 1 or 0.5)")
        if self.engine.keep == "sqrt" and self.engine.differentiation == "unroll":
            raise ValueError("engine.keep=sqrt needs engine.differentiation=remat: unroll keeps every step")
        return self

    def batch_size(self, target: int) -> int:
        """Tasks of a meta-step while the run should have `target` workers."""
        return self.tasks_per_worker * target if self.tasks_per_worker else self.meta_batch_size or 32
