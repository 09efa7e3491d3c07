"""The Ray that a run starts for itself, where server and claim are placed, and a head that is gone. In processes of
their own: each wants a Ray with settings of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metadist.core.errors import InputError
from metadist.fleet.ray.cluster import LONGEST_FOLDER, own_environment, ray_folder

pytestmark = pytest.mark.ray

SMALL = [
    "data.family=digits", "task.ways=3", "model.name=conv4", "model.channels=32", "meta_batch_size=24",
    "engine.chunk_size=2", "num_workers=2", "evaluation.every=0", "evaluation.test_tasks=2", "evaluation.baselines=[]",
    "tracking.mlflow=false", "checkpoint.every=100000", "meta_steps=100000",
]  # fmt: skip

EARLY = """
import json, psutil, ray, sys
from metadist.config import load_config
from metadist.core.errors import InputError
from metadist.run.build import Job
from metadist.run.fleets import Cluster
from metadist.run.prepare import prepare

def begin(cluster):
    cluster.begin_workers(prepared)
    alive = [bool(ray.get(actor.node.remote())) for actor in cluster.workers()]
    return alive, sorted(each["name"] for each in ray.util.list_named_actors(all_namespaces=True))

config = load_config([], sys.argv[1:])
prepared, told = prepare(Job(config), []), {}
try:
    with Cluster(config, 2, print) as cluster:
        told["begun"] = begin(cluster)
        processes = psutil.Process().children(recursive=True)
        raise InputError("what the checks found")
except InputError:
    told["left"] = [str(each) for each in psutil.wait_procs(processes, timeout=10)[1]]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
with Cluster(config, 2, print) as cluster:
    told["there"] = begin(cluster)
told["stays"] = ray.is_initialized()
ray.shutdown()
print(json.dumps(told))
"""
LISTENING = '''
def listening(pids):
    """Addresses at which TCP connections to these processes are waited for, as the kernel tells them."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1].partition(":")[0])
    return found


def family(root):
    """A process and all that descend from it."""
    parents = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                parents[int(each.name)] = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                pass
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family
'''
OWN = LISTENING.join(
    (
        "import json, os, psutil, subprocess, sys\nfrom pathlib import Path\n",
        """
from metadist.fleet.ray.cluster import connect, disconnect
import ray

class Actor:
    def environment(self):
        return os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN", "")

def begin():
    connect(None, 1, lambda text: None)
    actor = ray.remote(Actor).remote()
    return ray.get(actor.environment.remote())

before = dict(os.environ)
told = {"first": begin(), "addresses": listening(family(os.getpid()))}
address = ray.get_runtime_context().gcs_address
ask = f"from ray._raylet import GcsClient; print(GcsClient(address='{address}').internal_kv_keys(b'', timeout=5))"
asked = [sys.executable, "-c", ask]
told["stranger"] = subprocess.run(asked, capture_output=True, text=True, timeout=100).stderr[-3000:]
token = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": told["first"][1]}
told["friend"] = subprocess.run(asked, capture_output=True, text=True, timeout=100, env=token).stderr[-3000:]
told["processes"] = [" ".join(each.cmdline()) for each in psutil.Process().children(recursive=True)]
told["folder"] = ray._private.worker._global_node.get_session_dir_path()
told["mode"] = os.stat(Path(told["folder"]).parents[1]).st_mode & 0o777
disconnect()
told["left"] = sorted(os.environ.keys() - before.keys())
os.environ["RAY_AUTH_MODE"] = "disabled"
told["disabled"] = begin()
disconnect()
print(json.dumps(told))
""",
    )
)


def test_a_ray_of_ones_own_is_closed_to_others_and_leaves_the_home_alone(tmp_path):
    """Loopback only (0100007F in /proc/net/tcp; mapped, in tcp6), a token per run that only its processes know, files
    in a folder of mode 0700; a user who decided against tokens is heeded."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OWN], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert len(told["addresses"]) >= 5 and set(told["addresses"]) <= loopback
    assert "nauthenticated" in told["stranger"] and told["friend"] == ""
    assert told["mode"] == 0o700
    every = " ".join(told["processes"])
    assert "raylet" in every and not any(f"{name}.py" in every for name in ("monitor", "log_monitor", "dashboard"))
    assert told["first"][0] == "token" and len(told["first"][1]) >= 32
    assert told["disabled"] == ["disabled", ""]
    assert [name for name in told["left"] if name.startswith("RAY_AUTH")] == []
    assert not (tmp_path / ".ray").exists()


def test_ray_gets_a_short_folder_where_the_temporary_one_is_too_long_for_its_sockets(tmp_path, monkeypatch):
    said: list[str] = []
    deep = tmp_path / "a_rather_long_scratch_directory_name" / "slurm_job_1234567" / "node_local_scratch"
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        monkeypatch.setenv(name, str(deep))
        folder = ray_folder(said.append)
        session = f"{folder}/session_2026-11-26_19-12-50_664619_4194304/sockets/plasma_store"
        assert len(session) <= 107 and not deep.exists()
        assert os.stat(Path(folder).parent).st_mode & 0o777 == 0o700
    assert len(said) == 2 and f"the path {deep} is too long" in said[0] and folder.rpartition("/")[0] in said[0]
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert ray_folder(said.append) == f"/tmp/metadist-{os.getuid()}/ray" and len(said) == 2


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        (place / "metadist-0").mkdir(parents=True)
        os.chown(place / "metadist-0", 12345, 12345)
    monkeypatch.setattr("metadist.fleet.ray.cluster.FOLDERS", (str(places[1]),))
    monkeypatch.setattr("metadist.fleet.ray.cluster.LONGEST_FOLDER", 500)
    monkeypatch.setenv("RAY_TMPDIR", str(places[0]))
    with pytest.raises(InputError, match="set RAY_TMPDIR to a folder that you may write to"):
        ray_folder(lambda text: None)
    assert LONGEST_FOLDER == 43


NODES = """
import numpy as np, ray
from ray._private import state
from ray.cluster_utils import Cluster
from metadist.fleet.ray.cluster import claim
from metadist.fleet.ray.fleet import RayExecutor, Resources
from metadist.fleet.recovery import ShardedServer
from metadist.fleet.server import Optimization

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for _ in range(2):
    cluster.add_node(num_cpus=4, wait=False)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
here = ray.get_runtime_context().get_node_id()
kept = [claim(f"s3://runs/{number}", "me") for number in range(4)]
executor = RayExecutor(None, Resources(), print)
servers = [ShardedServer(executor, np.zeros(10, np.float32), Optimization(), None) for _ in range(4)]
for server in servers:
    server.pids()
for writer in kept:
    ray.get(writer.holder.remote())
nodes = [actor["Address"]["NodeID"] for actor in state.actors().values()]
print([node == here for node in nodes])
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.wide
def test_the_server_and_the_claim_of_an_object_store_are_on_the_drivers_node():
    """Of three; soft affinity without CPUs put them on any."""
    done = subprocess.run([sys.executable, "-c", NODES], capture_output=True, text=True, timeout=150)
    assert done.stdout.splitlines()[-1] == str([True] * 8), done.stdout + done.stderr[-3000:]


def test_the_environment_of_an_own_ray_comes_and_goes_at_once(monkeypatch):
    """Within it, where another thread starts Ray, no variable vanishes, and the token stays the same."""
    monkeypatch.setenv("RAY_health_check_period_ms", "700")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    before = dict(os.environ)
    with own_environment():
        outside = dict(os.environ)
        with own_environment():
            assert dict(os.environ) == outside
        assert dict(os.environ) == outside
    assert len(outside["RAY_AUTH_TOKEN"]) == 64 and outside["RAY_health_check_period_ms"] == "700"
    assert dict(os.environ) == before


def test_workers_that_have_begun_end_with_their_ray_and_none_begin_on_one_that_stays(tmp_path):
    """Where the checks find something meanwhile."""
    job = [*SMALL, "fleet.backend=ray", f"run_dir={tmp_path / 'early'}"]
    done = subprocess.run([sys.executable, "-c", EARLY, *job], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["begun"] == [[True, True], ["early-worker-0", "early-worker-1"]]
    assert told["left"] == []
    assert told["there"] == [[], []] and told["stays"]


def test_a_head_that_dies_is_told_within_seconds_and_the_run_is_saved_and_ends(tmp_path):
    command = [sys.executable, "-m", "metadist", "train", *SMALL, f"run_dir={tmp_path / 'run'}"]
    journal = tmp_path / "run" / "journal.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 90
        while not journal.exists() or '"applied"' not in journal.read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        children = [pid for each in Path(f"/proc/{process.pid}/task").iterdir()
                    for pid in (each / "children").read_text().split()]  # fmt: skip
        (head,) = [pid for pid in children if Path(f"/proc/{pid}/comm").read_text().strip() == "gcs_server"]
        os.kill(int(head), signal.SIGKILL)
        began = time.monotonic()
        assert process.stderr is not None
        said = [(time.monotonic() - began, line) for line in process.stderr]
    assert process.returncode == 1
    (told_s,) = [at for at, line in said if "Ray's head at 127.0.0.1" in line and "the run is saved and ends" in line]
    assert told_s < 12
    last_s, last = said[-1]
    assert last_s < 50 and "--resume auto" in last and "Traceback" not in "".join(line for _, line in said)
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith("step_")]
    assert f"the run is saved at step {int(saved[0].removeprefix('step_'))}\n" in last
