import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from metadist.core.messages import PHASES, Chunk, Weights, fold
from metadist.core.random import Draws
from metadist.core.task import Task, TaskId
from metadist.engine import Engine
from metadist.evaluation import Evaluator
from metadist.evaluation.baselines import nearest_class_mean, ridge, support_mean
from metadist.fleet.worker import Worker
from metadist.learners import MAML, Reptile
from metadist.models import MLP, Model
from metadist.models.losses import accuracy, cross_entropy, mean_squared_error
from tests.learners.small import classification_task, regression_task, smooth_model

CHUNK = Chunk("train", 3, 2, 6)


def named_task(task_id: TaskId) -> Task:
    """A source is any function of a task's name."""
    seed = task_id.index + 100 * task_id.step + 10000 * ["train", "validation", "test"].index(task_id.split)
    return classification_task(seed).map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x)


def make_worker(
    learner_class=MAML, kind="vmap", aggregate="task", seed=0, chunk=1, loss=cross_entropy, **options
) -> Worker:
    torch.manual_seed(0)
    model = Model(MLP([[4]], 3, hidden=(5,)))
    engine = Engine(learner_class(model=model, loss=loss, **options), kind)
    later = Engine(learner_class(model=model, loss=cross_entropy, **(options | {"inner_steps": 4})), kind)
    protocol = Evaluator(later, named_task, {"accuracy": accuracy, "loss": cross_entropy}, True, scratch_steps=30)
    return Worker(engine, named_task, protocol, seed, meta_steps=10, aggregate=aggregate, chunk_size=chunk)


def weights_of(worker: Worker) -> Weights:
    return Weights(3, worker.engine.initial_theta().numpy())


def test_rows_losses_and_norms_are_those_of_the_tasks_named():
    worker = make_worker()
    weights = weights_of(worker)
    report, rows = worker.meta_gradients(weights, CHUNK)
    tasks = [named_task(TaskId("train", 3, index)) for index in (2, 3, 4, 5)]
    losses, expected = worker.engine.meta_gradients(torch.from_numpy(weights.theta), tasks)
    assert report.chunk == CHUNK and np.array_equal(rows, expected.numpy()) and rows.dtype == np.float32
    assert np.array_equal(report.losses, losses.numpy().astype(np.float64))
    assert np.allclose(report.norms, np.linalg.norm(rows.astype(np.float64), axis=1), rtol=1e-12)
    assert report.norms.dtype == report.losses.dtype == np.float64
    assert tuple(report.seconds) == PHASES and min(report.seconds.values()) > 0


def test_norms_do_not_overflow_where_float32_would():
    worker = make_worker(inner_steps=0)
    worker.source = lambda task_id: named_task(task_id).map(lambda x: x * 1e25 if x.dtype == np.float32 else x)
    report, rows = worker.meta_gradients(weights_of(worker), CHUNK)
    assert np.isfinite(rows).all() and rows.max() > 1e20 and np.isfinite(report.norms).all()


def test_a_chunk_in_one_sum_is_the_fold_of_its_rows():
    by_task, by_chunk = make_worker(), make_worker(aggregate="chunk")
    weights = weights_of(by_task)
    report, rows = by_task.meta_gradients(weights, CHUNK)
    summed, total = by_chunk.meta_gradients(weights, CHUNK)
    assert total.dtype == np.float64 and np.array_equal(total, fold([rows], rows.shape[1]))
    assert np.array_equal(summed.norms, report.norms) and np.array_equal(summed.losses, report.losses)


def test_a_worker_keeps_nothing_between_chunks():
    worker, weights = make_worker(), weights_of(make_worker())
    _, first = worker.meta_gradients(weights, CHUNK)
    worker.evaluate(weights, Chunk("test", 0, 0, 3), ("from_scratch",))
    worker.meta_gradients(Weights(4, weights.theta + 1), Chunk("train", 4, 0, 3))
    _, again = worker.meta_gradients(weights, CHUNK)
    assert np.array_equal(first, again)


def test_weights_are_not_changed_and_may_be_read_only():
    worker = make_worker()
    weights = weights_of(worker)
    weights.theta.flags.writeable = False
    before = weights.theta.copy()
    worker.meta_gradients(weights, CHUNK)
    worker.evaluate(weights, CHUNK)
    assert np.array_equal(weights.theta, before)


def test_the_learners_draws_are_keyed_by_seed_and_task_not_by_place():
    options = {"inner_batch": 2, "inner_steps": 3}
    worker, other = (make_worker(Reptile, seed=seed, **options) for seed in (0, 1))
    weights = weights_of(worker)
    _, whole = worker.meta_gradients(weights, CHUNK)
    _, part = worker.meta_gradients(weights, Chunk("train", 3, 4, 6))
    assert np.allclose(whole[2:], part, rtol=1e-4, atol=1e-6)
    assert not np.allclose(whole, other.meta_gradients(weights, CHUNK)[1], rtol=1e-2)


class Telling(MAML):
    """Its outer loss is what it was told: the meta-step, and the first of its draws."""

    engines = ("loop",)

    def draw(self, draws, support_size):
        return {"word": np.array([draws.word() >> 12], np.int64)}

    def outer_loss(self, theta, fast, query, context):
        told = context.step if self.inner_steps else context.draws["word"].double().sum()
        return super().outer_loss(theta, fast, query, context) * 0 + told


def test_a_learner_is_told_the_chunks_own_meta_step():
    worker = make_worker(Telling, kind="loop", inner_steps=1)
    for step in (0, 3, 8):
        report, _ = worker.meta_gradients(weights_of(worker), Chunk("train", step, 0, 2))
        assert report.losses.tolist() == [step, step]


def test_a_learners_draws_are_not_those_that_sample_the_task():
    """Philox words of stream 1 of the task's key, by numpy itself; those of stream 0 choose its examples."""
    worker = make_worker(Telling, kind="loop", inner_steps=0, seed=5)
    report, _ = worker.meta_gradients(weights_of(worker), Chunk("train", 3, 2, 4))
    for stream, equal in ((1, True), (0, False)):
        words = [int(np.random.Philox(key=[5, stream], counter=[0, index, 3, 0]).random_raw(1)[0]) for index in (2, 3)]
        expected = np.array([word >> 12 for word in words], np.float32).astype(np.float64)
        assert np.array_equal(report.losses, expected) == equal


def test_a_process_computes_deterministically_without_the_compilers_import():
    code = (
        "import sys, torch; from metadist.fleet.worker import set_up_process; set_up_process(1); "
        "assert torch.get_deterministic_debug_mode() == 2 and 'torch._inductor' not in sys.modules\n"
        "from metadist.engine.graph_cache import Program\n"
        "program = Program(lambda structure, step, meta_steps, tensors: [tensors[0] * 3], compiled=True)\n"
        "torch.compile = lambda graph, **options: graph\n"  # what is asked is the setting it would be compiled with
        "program((), 0, 1, [torch.ones(2)]); from torch._inductor import config; assert config.deterministic"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_is_recorded_before_the_first_steps_are_over():
    calls: list[int] = []

    def loss(outputs, target):
        calls.append(1)
        return cross_entropy(outputs, target)

    worker = make_worker(kind="loop", chunk=4, loss=loss)
    worker.proof()
    called = []
    for step in range(8):  # of 4 tasks each, which the loop computes one by one
        calls.clear()
        worker.meta_gradients(weights_of(worker), Chunk("train", step, 0, 4))
        called.append(bool(calls))
    assert called[0] and not called[-1]


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_neither_a_worker_that_records_nor_a_checked_gradient_nor_the_server_imports_the_compiler(kind):
    code = (
        "import sys\n"
        "from tests.fleet.test_worker import *\n"
        "from metadist.engine.gradient_check import check_gradient\n"
        "from metadist.engine.graph_cache import AFTER\n"
        "from metadist.fleet.server import Optimization, Server, server_proof\n"
        f"worker = make_worker(kind={kind!r}, chunk=4)\n"
        "for step in range(AFTER + 2):\n"
        "    worker.meta_gradients(weights_of(worker), Chunk('train', step, 0, 4))\n"
        "    worker.evaluate(weights_of(worker), Chunk('validation', step, 0, 4))\n"
        "for engine in (worker.engine, worker.evaluator.engine):\n"
        "    for program in (engine._program, engine._evaluation):\n"
        "        print(sum(known.play is not None for known in program._records.values()))\n"
        "engine, task = worker.engine, worker.source(TaskId('train', 0, 0))\n"
        "check_gradient(engine.learner, engine.method, weights_of(worker).theta, task)\n"
        "server_proof()\n"
        "server = Server(np.ones(3, np.float32), Optimization('adam'))\n"
        "Server(np.ones(3, np.float32), Optimization('adam'), server.snapshot())\n"
        "print({'torch._dynamo', 'sympy', 'scipy'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0", "0", "1", "set()"]


def test_evaluation_measures_before_and_after_every_inner_step_of_its_own_learner():
    worker = make_worker(inner_lr=0.5)
    results = worker.evaluate(weights_of(worker), Chunk("validation", 0, 0, 7))
    assert {name: values.shape for name, values in results.items()} == {"accuracy": (7, 5), "loss": (7, 5)}
    assert all(values.dtype == np.float64 for values in results.values())
    assert results["loss"][:, -1].mean() < results["loss"][:, 0].mean()


def test_evaluation_computes_the_baselines_asked_for():
    worker = make_worker()
    chunk = Chunk("test", 0, 0, 4)
    results = worker.evaluate(weights_of(worker), chunk, ("nearest_class_mean", "from_scratch"))
    assert results["nearest_class_mean/accuracy"].shape == results["from_scratch/loss"].shape == (4,)
    for place, task_id in enumerate(chunk.tasks):
        task = named_task(task_id)
        logits = torch.from_numpy(nearest_class_mean(task))
        labels = torch.from_numpy(task.query.targets[0])
        assert math.isclose(results["nearest_class_mean/accuracy"][place], float(accuracy(logits, labels)))
        assert math.isclose(results["nearest_class_mean/loss"][place], float(cross_entropy(logits, labels)))
    assert results["from_scratch/accuracy"].mean() > 0.5
    again = worker.evaluate(weights_of(worker), Chunk("test", 0, 2, 4), ("from_scratch",))
    assert np.array_equal(again["from_scratch/loss"], results["from_scratch/loss"][2:])


def test_baselines_of_a_regression_are_measured_too():
    engine = Engine(MAML(model=smooth_model(), loss=mean_squared_error), "loop")
    protocol = Evaluator(engine, lambda task_id: regression_task(task_id.index), {"loss": mean_squared_error}, True, 10)
    worker = Worker(engine, protocol.source, protocol, 0, 1)
    results = worker.evaluate(weights_of(worker), Chunk("test", 0, 0, 3), ("support_mean", "ridge"))
    for place in range(3):
        task = regression_task(place)
        targets = task.query.targets[0].astype(np.float32)
        for name, baseline in (("support_mean", support_mean), ("ridge", ridge)):
            expected = float(np.mean((baseline(task)[:, 0] - targets) ** 2))
            assert math.isclose(results[f"{name}/loss"][place], expected, rel_tol=1e-6)


@pytest.mark.parametrize("learner_class", [MAML, Reptile])
def test_a_trace_starts_from_the_weights_given(learner_class):
    worker = make_worker(learner_class, inner_steps=3)
    weights = weights_of(worker)
    traced = worker.trace(weights, TaskId("train", 3, 2))
    assert len(traced) == 4 and math.isclose(traced[0][1], np.linalg.norm(weights.theta), rel_tol=1e-5)
    task = named_task(TaskId("train", 3, 2))
    own = worker.engine.trace(torch.from_numpy(weights.theta), task, Draws(0, TaskId("train", 3, 2), 1))
    assert traced == own


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_threads_that_share_a_worker_get_the_bits_of_one_after_the_other(kind):
    shared, alone = (make_worker(kind=kind, inner_steps=2) for _ in range(2))
    weights = weights_of(alone)
    chunks = [Chunk("train", 3, start, start + 2) for start in range(0, 48, 2)]
    expected = [alone.meta_gradients(weights, chunk) for chunk in chunks]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda chunk: shared.meta_gradients(weights, chunk), chunks))
    for (report, rows), (same, bits) in zip(found, expected, strict=True):
        assert report.chunk == same.chunk and np.array_equal(rows, bits) and np.array_equal(report.losses, same.losses)


def test_whatever_threads_ask_one_computes_and_the_main_one_for_itself():
    """glibc keeps freed memory per thread: each that computes would hold as much as one."""
    threads_of_loss = set()

    def loss(outputs, targets):
        threads_of_loss.add(threading.current_thread())
        return cross_entropy(outputs, targets)

    worker = make_worker(loss=loss)
    weights, several = weights_of(worker), threading.Barrier(3)

    def ask(_):
        several.wait()
        worker.meta_gradients(weights, CHUNK)
        return threading.current_thread()

    with ThreadPoolExecutor(3) as threads:
        asked = set(threads.map(ask, range(3)))
    assert len(asked) == 3 and len(threads_of_loss) == 1 and not threads_of_loss & asked
    threads_of_loss.clear()
    worker.meta_gradients(weights, CHUNK)
    assert threads_of_loss == {threading.main_thread()}


def test_threads_that_evaluate_do_not_see_each_others_weights():
    shared, alone = make_worker(kind="vmap"), make_worker(kind="vmap")
    weights, baselines = weights_of(alone), ("from_scratch",)
    chunks = [Chunk("test", 0, start, start + 2) for start in range(0, 16, 2)]
    expected = [alone.evaluate(weights, chunk, baselines) for chunk in chunks]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda chunk: shared.evaluate(weights, chunk, baselines), chunks))
    assert all(
        np.array_equal(one[name], other[name]) for one, other in zip(found, expected, strict=True) for name in one
    )
