"""Training through Ray actors: kinds of data, a user's own pieces, errors, resources."""

import gc
import os
import signal
import sys
import textwrap
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import ray

from metadist.checkpoint.format import theta_sha256
from metadist.config import load_config
from metadist.core.errors import Diverged, InputError, Interrupted
from metadist.core.messages import Chunk, ChunkReport, Weights, plan
from metadist.data import importers
from metadist.fleet.dispatch import Ahead
from metadist.fleet.limits import Patience
from metadist.fleet.local import LocalFleet
from metadist.fleet.recovery import ShardedServer
from metadist.fleet.server import BLOCK, Optimization, server_proof, slices
from metadist.run.api import train
from metadist.run.build import Job
from metadist.run.prepare import prepare

pytestmark = pytest.mark.ray

SMALL = [
    "num_workers=2", "evaluation.every=0", "evaluation.test_tasks=60", "evaluation.baseline_tasks=0",
    "evaluation.baselines=[]", "tracking.mlflow=false", "engine.chunk_size=8",
]  # fmt: skip


def go(tmp_path, *overrides: str):
    return train(load_config([], [*SMALL, f"run_dir={tmp_path / 'run'}", *overrides]), quiet=True)


def test_per_user_labelled_table(tmp_path):
    """Each user likes points on one side of a line of their own: nothing to learn but from the support set."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(120), 40)
    x = rng.normal(size=(len(users), 2))
    angle = rng.uniform(0, 2 * np.pi, 120)[users]
    likes = np.where(x[:, 0] * np.cos(angle) + x[:, 1] * np.sin(angle) > 0, "yes", "no")
    pq.write_table(pa.table({"user": users, "a": x[:, 0], "b": x[:, 1], "likes": likes}), tmp_path / "likes.parquet")
    importers.table(tmp_path / "likes.parquet", tmp_path / "data", group="user", inputs=["x=a,b"], targets=["likes"])
    task = ["task.ways=2", "task.shots=5", "task.queries=5", "learner.inner_lr=0.3", "learner.inner_steps=3"]
    task += ["meta_steps=60", "meta_lr=0.01", "meta_batch_size=16", "fleet.backend=local"]
    told = go(tmp_path, f"data.path={tmp_path / 'data'}", *task)
    assert told["accuracy"]["before"]["mean"] == pytest.approx(0.5, abs=0.12)
    assert told["accuracy"]["after"]["mean"] > 0.75


def test_two_input_table(tmp_path):
    """y = slope of the group * x1 + x2, from two input fields of different width."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 30)
    x1, x2 = rng.normal(size=(len(groups), 1)), rng.normal(size=(len(groups), 2))
    y = rng.uniform(-2, 2, 100)[groups] * x1[:, 0] + x2[:, 0]
    columns = {"g": groups, "p": x1[:, 0], "q": x2[:, 0], "r": x2[:, 1], "y": y}
    pa.csv.write_csv(pa.table(columns), tmp_path / "two.csv")
    importers.table(tmp_path / "two.csv", tmp_path / "data", group="g", inputs=["one=p", "two=q,r"], targets=["y"])
    task = ["task.shots=10", "task.queries=10", "learner.inner_lr=0.05", "learner.inner_steps=2", "model.hidden=[32]"]
    task += ["meta_steps=150", "meta_lr=0.01", "meta_batch_size=16", "fleet.backend=local"]
    told = go(tmp_path, f"data.path={tmp_path / 'data'}", *task)
    assert told["loss"]["after"]["mean"] < 0.6 * told["loss"]["before"]["mean"]


def test_own_model_loss_learner_and_source_from_a_module_beside_the_job(ray_cluster, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        textwrap.dedent('''
        import numpy as np, torch
        from metadist import Draws, MAML, Task

        class Lines:
            """y = slope * x: a family of tasks."""
            outputs = 1
            def __init__(self, seed, steep=1.0):
                self.seed, self.steep = seed, steep
            def __call__(self, task_id):
                draws = Draws(self.seed, task_id)
                slope, x = self.steep * draws.normal(1), draws.uniform(12).astype(np.float32)[:, None]
                y = (slope * x).astype(np.float32)
                return Task.of(x[:6], y[:6], x[6:], y[6:])

        def network(width: int = 8):
            return torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

        def absolute(outputs, target):
            return (outputs - target).abs().mean()

        class SignMAML(MAML):
            def update(self, theta, fast, gradient, k):
                steps = {n: self.inner_lr * torch.tanh(g) for n, g in gradient.items()}
                return fast._replace(weights={n: w - steps[n] for n, w in fast.weights.items()})
        ''')
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    pieces = ["data.source=mine:Lines", "data.options={steep: 2.0}", "model.name=mine:network", "model.width=16"]
    told = go(
        tmp_path, *pieces, "loss=mine:absolute", "learner.name=mine:SignMAML", "learner.inner_lr=1e-1", "meta_steps=5"
    )
    sys.modules.pop("mine", None)
    assert told["meta_steps"] == 5
    assert set(told) >= {"loss", "theta_sha256"}


def test_an_error_in_a_users_code_is_told_before_training(ray_cluster, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def forward(self, x):\n        raise KeyError('no thing')\n"
    )
    monkeypatch.chdir(tmp_path)
    model = ["model.name=broken:Net", "model.in_features=64", "model.out_features=3", "meta_steps=2"]
    with pytest.raises(InputError, match="KeyError: 'no thing'"):
        go(tmp_path, "data.family=digits", "task.ways=3", *model)
    sys.modules.pop("broken", None)


def test_workers_that_cannot_be_placed_are_waited_for_in_words_until_a_signal(ray_cluster):
    """The fleet says what it lacks, and a request to stop ends the wait."""
    from metadist.fleet.ray.fleet import RayFleet, Resources

    said: list[str] = []
    fleet = RayFleet(
        lambda: None,  # pyright: ignore
        1,
        resources=Resources(cpus=64, gpus=1, custom={"lab": 1}),
        asked_to_stop=lambda: 15 if said else None,
        say=said.append,
        patience=Patience(notice_s=1),
    )
    with pytest.raises(Interrupted):
        fleet.meta_gradients([ray.put(None)], [Chunk("train", 0, 0, 1)])
    fleet.close()
    assert "waiting for workers: 0 of 1 have joined; each worker asks for 64 CPU and 1 GPU and 1 lab" in said[0]
    assert "0 GPU and 0 lab: waiting for a node that has" in said[0]


def test_actors_are_named_for_their_run_also_where_another_run_has_that_name(ray_cluster):
    from metadist.fleet.ray.cluster import NAMESPACE
    from metadist.fleet.ray.fleet import RayExecutor, Resources

    def names() -> list[str]:
        found = (
            each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == NAMESPACE
        )
        return sorted(name for name in found if name.startswith("twins-"))

    executors = [RayExecutor(lambda: None, Resources(cpus=0, threads=None), print, run="twins") for _ in range(2)]
    actors = [executor.start_worker(3, frozenset()) for executor in executors]
    first, second = names()
    for executor, actor in zip(executors, actors, strict=True):
        executor.end(actor)
        executor.close()
    assert first == "twins-worker-3" and second.startswith("twins-worker-3-") and len(second) > len(first) + 1


def test_workers_begun_before_their_fleet_are_its_first(ray_cluster):
    from metadist.fleet.ray.fleet import RayFleet, Resources, begin_workers

    config = load_config([], [*SMALL, "data.family=sinusoid", "run_dir=early"])
    made, wanted = Job(config).worker_factory({}), Resources(cpus=0, threads=1)
    begun = begin_workers(made, wanted, "early", 2)
    fleet, theta = RayFleet(made, 2, resources=wanted, run="early", begun=begun), Job(config).engine().initial_theta()
    try:
        while fleet.num_workers < 2:
            fleet.evaluate((ray.put(Weights(0, theta.numpy())),), plan("test", 0, 16, 8))
        found = [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
        assert sorted(name for name in found if name.startswith("early-")) == ["early-worker-0", "early-worker-1"]
        assert len({ray.get(actor.still_there.remote()).pid for actor in begun}) == 2
    finally:
        fleet.close()


def test_what_is_taken_is_at_first_that_of_workers_being_started_also_where_others_use_the_cluster(ray_cluster):
    """Ray does not say whose it is; others have it where nothing changes for long."""
    from metadist.fleet.ray.fleet import STARTING_S, RayExecutor, Resources

    class Holder:
        def there(self):
            return True

    cpus = ray.cluster_resources()["CPU"]
    holder = ray.remote(num_cpus=cpus)(Holder).remote()
    assert ray.get(holder.there.remote())
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    executor, now = RayExecutor(lambda: None, Resources(cpus=cpus / 2), print), 100.0
    executor.now = lambda: now
    assert executor.shortage(2, 0, 0, 0) == "2 being started"
    now += STARTING_S + 1
    assert f"2 for want of room: each asks for {cpus / 2:g} CPU, and the cluster has 0 of" in executor.shortage(2, 0, 0)
    assert executor.shortage(1, 0, 0, 1) == "1 being started"  # which has changed
    assert "for want of room" in executor.shortage(2, 0, 0, 1)  # three of them, for which there is no room at all
    executor.close()
    ray.kill(holder)


def test_a_run_that_waits_for_workers_follows_a_new_target(ray_cluster, tmp_path):
    from metadist.fleet.ray.fleet import RayFleet, Resources

    config = load_config([], [*SMALL, "data.family=digits", "task.ways=3", "model.name=mlp", f"run_dir={tmp_path}"])
    said: list[str] = []
    fleet = RayFleet(
        lambda: Job(config).worker(),
        2,
        min_workers=2,
        resources=Resources(cpus=ray.cluster_resources()["CPU"] * 0.6),
        asked_target=lambda: 1 if said else None,
        say=said.append,
        patience=Patience(notice_s=1),
    )
    theta = prepare(Job(config), []).theta
    fleet.meta_gradients([ray.put(Weights(0, theta))], [Chunk("train", 0, 0, 1)])
    fleet.close()
    assert "of 2 have joined" in said[0] and "for want of room: each asks for" in " ".join(said)
    assert fleet.target == 1


def test_workers_that_compute_other_bits_are_refused(ray_cluster):
    from metadist.fleet.ray.fleet import RayFleet

    class Odd:
        """Stands in for a worker: proves itself by its own process id, so that no two are equal."""

        def proof(self) -> str:
            return str(os.getpid())

    step = [Chunk("train", 0, 0, 1), Chunk("train", 0, 1, 2), Chunk("train", 0, 2, 3)]
    for before, alone in ((None, 2), ("what the run began with", 1)):
        fleet = RayFleet(Odd, alone, min_workers=alone, proof=before)  # pyright: ignore
        with pytest.raises(InputError, match="does not compute the same bits as those before it"):
            fleet.meta_gradients([ray.put(None)], step)
        fleet.close()


def test_a_model_that_draws_its_own_random_numbers_is_refused(ray_cluster, tmp_path, monkeypatch):
    (tmp_path / "noisy.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n    def forward(self, x):\n"
        "        return super().forward(torch.nn.functional.dropout(x.flatten(1)))\n"
    )
    monkeypatch.chdir(tmp_path)
    model = ["model.name=noisy:Net", "model.in_features=64", "model.out_features=3", "engine.kind=loop"]
    with pytest.raises(InputError, match="draws random numbers of its own"):
        go(tmp_path, "data.family=digits", "task.ways=3", *model)
    sys.modules.pop("noisy", None)


@pytest.mark.wide
def test_a_worker_that_dies_in_the_middle_of_a_step_changes_nothing(ray_cluster, tmp_path, monkeypatch):
    """A source whose process kills itself once, while it samples a task of step 2."""
    (tmp_path / "fatal.py").write_text(
        "import os, signal\nimport numpy as np\nfrom metadist import Draws, Task\n"
        "class Lines:\n    outputs = 1\n"
        "    def __init__(self, seed, flag=''):\n        self.seed, self.flag = seed, flag\n"
        "    def __call__(self, task_id):\n"
        "        if self.flag and task_id[1:] == (2, 5) and not os.path.exists(self.flag):\n"
        "            open(self.flag, 'w').close()\n            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        draws = Draws(self.seed, task_id)\n"
        "        x = draws.uniform(12).astype(np.float32)[:, None]\n"
        "        y = (draws.normal(1) * x).astype(np.float32)\n"
        "        return Task.of(x[:6], y[:6], x[6:], y[6:])\n"
    )
    monkeypatch.chdir(tmp_path)
    job = ["data.source=fatal:Lines", "model.name=mlp", "meta_steps=4", "meta_batch_size=8", "engine.chunk_size=2"]
    thetas = []
    for name, flag, fleet in (("plain", "", "local"), ("fatal", str(tmp_path / "flag"), "ray")):
        overrides = [*SMALL[:-1], *job, f"data.options={{flag: '{flag}'}}", f"run_dir={tmp_path / name}"]
        overrides += [f"fleet.backend={fleet}"]
        thetas.append(train(load_config([], overrides), quiet=True)["theta_sha256"])
    sys.modules.pop("fatal", None)
    assert (tmp_path / "flag").exists()
    assert thetas[0] == thetas[1]


@pytest.mark.wide
def test_theta_on_two_servers_is_the_one_of_a_local_run(ray_cluster, tmp_path):
    """More than one block of parameters, and so many chunks a step that results are also sent ahead."""
    job = ["data.family=digits", "task.ways=3", "model.name=mlp", "model.hidden=[256, 256]", "meta_batch_size=40"]
    job += ["meta_steps=3", "engine.chunk_size=1", "optimizer.clip_norm=0.1", "evaluation.test_tasks=2"]
    job += ["num_workers=1"]
    thetas = [
        train(load_config([], [*SMALL[:-1], *job, f"run_dir={tmp_path / name}", option]), quiet=True)["theta_sha256"]
        for name, option in (("local", "fleet.backend=local"), ("ray", "fleet.servers=2"))
    ]
    assert thetas[0] == thetas[1]


@pytest.mark.wide
def test_an_exception_that_does_not_come_again_costs_a_worker_where_the_job_allows_it(
    ray_cluster, tmp_path, monkeypatch
):
    (tmp_path / "flaky.py").write_text(
        "import os\nimport numpy as np\nfrom metadist import Draws, Task\n"
        "class Lines:\n    outputs = 1\n"
        "    def __init__(self, seed, flag):\n        self.seed, self.flag = seed, flag\n"
        "    def __call__(self, task_id):\n"
        "        if task_id[1:] == (2, 5) and not os.path.exists(self.flag):\n"
        "            open(self.flag, 'w').close()\n            raise OSError('the file server is away')\n"
        "        draws = Draws(self.seed, task_id)\n"
        "        x = draws.uniform(12).astype(np.float32)[:, None]\n"
        "        return Task.of(x[:6], 2 * x[:6], x[6:], 2 * x[6:])\n"
    )
    monkeypatch.chdir(tmp_path)
    job = ["data.source=flaky:Lines", "model.name=mlp", "meta_steps=4", "meta_batch_size=8", "engine.chunk_size=2"]
    job += ["num_workers=1"]

    def theta(name: str, *overrides: str) -> str:
        own = [f"data.options={{flag: '{tmp_path / name}.flag'}}", f"run_dir={tmp_path / name}"]
        return train(load_config([], [*SMALL[:-1], *job, *own, *overrides]), quiet=True)["theta_sha256"]

    with pytest.raises(OSError, match="file server"):
        theta("strict")
    again = theta("again", "fleet.max_errors=1")
    (tmp_path / "calm.flag").touch()
    assert again == theta("calm", "fleet.backend=local")
    sys.modules.pop("flaky", None)


def test_an_evaluation_on_training_tasks_is_no_training(ray_cluster, tmp_path):
    """So many chunks that, of a meta-step, the first results would go to the server before the last have come."""
    job = ["data.family=digits", "task.ways=3", "model.name=mlp", "model.hidden=[8]", "meta_steps=1"]
    told = go(
        tmp_path, *job, "evaluation.split=train", "evaluation.test_tasks=80", "engine.chunk_size=1", "num_workers=1"
    )
    assert told["evaluated_step"] == 1


@pytest.mark.parametrize(("servers", "lag"), [(1, 0), pytest.param(2, 1, marks=pytest.mark.wide)])
def test_a_server_that_dies_between_two_steps_is_rebuilt(ray_cluster, tmp_path, servers, lag):
    from metadist.fleet.ray.fleet import RayFleet

    job = ["data.family=digits", "task.ways=3", "task.queries=3", "model.name=mlp", "model.hidden=[256,256]"]
    config = load_config([], [*SMALL, *job, "engine.chunk_size=2", f"run_dir={tmp_path}"])
    prepared = prepare(Job(config), [])
    optimization = Job(config).optimization(prepared.engine)
    tasks = [plan("train", step, 12, 2) for step in range(6)]

    def theta(fleet, disturb: bool) -> str:
        server = fleet.start_server(prepared.theta, optimization, None, lag=lag)
        for step in range(6):
            ahead = Ahead(server.weights(), [tasks[step + 1]]) if lag and step < 5 else None
            gradients = fleet.meta_gradients(server.used(), tasks[step], ahead)
            if disturb and step in (2, 3):
                os.kill(fleet.server_pids()[step % servers], signal.SIGKILL)
            server.apply(step, *gradients, num_tasks=12)
            assert [report.chunk for report in fleet.reports()] == tasks[step]
            held.append(len(ray._private.worker.global_worker.core_worker.get_all_reference_counts()))
            if disturb and step == 4:
                os.kill(fleet.server_pids()[0], signal.SIGKILL)
                assert server.snapshot()["step"] == 5
        return theta_sha256(fleet.fetch(server.weights()).theta)

    said: list[str] = []
    held: list[int] = []  # references, after each step
    fleet = RayFleet(lambda: Job(config).worker(), 2, servers=servers, say=said.append)
    gc.disable()  # nothing of a disturbed step may wait for a collection, in the object store
    found = theta(fleet, disturb=True)
    gc.enable()
    fleet.close()
    assert found == theta(LocalFleet(lambda: Job(config).worker()), disturb=False)
    assert sum("server was lost" in text for text in said) == 3
    assert max(held) < 2.5 * held[0]


def test_no_server_moves_where_one_would_not_stay_finite(ray_cluster):
    """The last element of theta, on the second of two servers, meets a gradient whose square float32 cannot hold."""
    from metadist.fleet.ray.fleet import RayExecutor, Resources

    size, executor = 2 * BLOCK + 9, RayExecutor(lambda: None, Resources(), print)
    pieces = slices(size, 2)
    server = ShardedServer(executor, np.ones(size, np.float32), Optimization(), None, servers=2)

    def result(step: int, last: float):
        rows = np.ones((1, size), np.float32)
        rows[0, -1] = last
        report = ChunkReport(Chunk("train", step, 0, 1), np.zeros(1), np.linalg.norm(rows.astype(float), axis=1), {})
        return [ray.put([report]), *(ray.put([np.ascontiguousarray(rows[:, piece])]) for piece in pieces)]

    server.apply(0, result(0, 1.0))
    with pytest.raises(Diverged, match="would make the optimizer's exp_avg_sq infinite or NaN") as raised:
        server.apply(1, result(1, 1e22))
    assert raised.value.element == size - 1
    assert server.snapshot()["step"] == 1 and [ray.get(ref).version for ref in server.weights()] == [1, 1]
    server.apply(1, result(1, 1.0))
    assert server.snapshot()["step"] == 2
    server.close()
    executor.close()


@pytest.mark.wide
def test_a_server_on_a_machine_that_computes_other_bits_is_refused_as_a_worker_is(ray_cluster, tmp_path):
    """At the start with what to do; later it is no place to rebuild one, so another is tried."""
    from metadist.fleet.ray.fleet import RayFleet

    job = ["data.family=digits", "task.ways=3", "model.name=mlp", "model.hidden=[4]", f"run_dir={tmp_path}"]
    config = load_config([], [*SMALL, *job])
    prepared = prepare(Job(config), [])
    optimization = Job(config).optimization(prepared.engine)

    def step(before: str | None, mixed: bool = False) -> str | None:
        fleet = RayFleet(lambda: Job(config).worker(), 1, mixed_devices=mixed, server_proof=before)
        server = fleet.start_server(prepared.theta, optimization, None)
        try:
            server.apply(0, *fleet.meta_gradients(server.used(), plan("train", 0, 2, 2)), num_tasks=2)
            return fleet.server_proof
        finally:
            fleet.close()

    proof = server_proof()
    assert step(proof) == proof == LocalFleet(lambda: Job(config).worker()).server_proof
    with pytest.raises(InputError, match=rf"parameter server \({proof}\) does not compute .* \(another\): use equal"):
        step("another")
    assert step("another", mixed=True) == "another"


def test_failures_are_told_apart(ray_cluster):
    from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayTaskError

    from metadist.fleet.ray.fleet import failure_of

    kinds = {
        ActorDiedError(): "died",
        ActorUnavailableError("no answer", None): "unavailable",
        OutOfMemoryError("killed"): "out of memory",
        RayTaskError("f", "traceback", OSError("flaky")): "error",
        RayTaskError("f", "traceback", ActorDiedError()): "lost",
        ObjectLostError("0" * 56, "", ""): "lost",
    }
    for error, kind in kinds.items():
        assert failure_of(error).kind == kind, error
    memory = (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node was 9GB / 10GB\nRefer to"
    )
    assert failure_of(OutOfMemoryError(memory)).reason == "OutOfMemoryError: Memory on the node was 9GB / 10GB"
