"""Joining a Ray cluster, or starting one on this machine; and whether its head still answers."""

import atexit
import hashlib
import logging
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private import node as ray_node
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._private.state import state
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayError, RpcError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.core.errors import HeadLost, InputError, doing_it_again
from metadist.fleet.ray.reach import check_head, read_environment, use_token

LONGEST_FOLDER = 107 - 64  # of the path of a unix socket, what Ray's session takes
LOOPBACK = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR  # whatever the system: 0 has Ray use the loopback interface
FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
OWN_RAY = {
    # a node that does not answer counts as dead after 20 s; on a cluster, with a threshold of 3, after 6
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "10",
    # what nobody refers to any more is freed after a tenth of a second: after one, Ray's default, three steps of
    # gradients lie in the object store, and in memory that each worker has to touch for the first time
    "RAY_free_objects_period_milliseconds": "100",
}
"""Environment of the processes of a Ray that is started here, where the user has not set it."""
ASK_EVERY_S, HEAD_ANSWER_S = 1.0, 1.5  # of the head
SAY_AFTER_S = 3.0
DRAIN_EVERY_S = 3.0
GIVE_UP_S = 40.0  # a cluster's head may be restarted, or its link mended, meanwhile
OWN_GIVE_UP_S = 20.0  # nobody restarts that of a Ray of our own
NAMESPACE = "metadist"  # of our actors' names
SLIVER = 1 << 20  # bytes of memory that an actor asks for which needs no CPU, so that its node does not count as unused
EXIT_S = 54.0  # before Ray does it (RAY_gcs_rpc_server_reconnect_timeout_s, 60)


def connect(address: str | None, cpus: float, say: Callable[[str], None]) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS, or start one here with at least `cpus` CPUs; True if this call did.

    A cluster started here counts as many CPUs as the workers ask for, even where that is more than there are.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # pages about what the fleet says in a line
    ray_worker.print_to_stdstream = _to_log  # what is said of nodes by others than the fleet, on stdout
    before = signal.getsignal(signal.SIGTERM)
    if address := joins(address):
        _join(address)
    else:
        _start(cpus, say)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # ray.init sets one that exits with another code
    return True


def _to_log(data: dict[str, Any], ignore_prefix: Any = None) -> None:
    """Lines that Ray would print go to its logger; they are in its log files too."""
    del ignore_prefix
    logging.getLogger("ray").info("(%s) %s", data.get("pid"), " ".join(data["lines"]))


def joins(address: str | None) -> str | None:
    """The cluster that is joined; None: one is started here."""
    return address or os.environ.get("RAY_ADDRESS")


def _join(address: str) -> None:
    check_cluster(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        raise InputError(f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}") from None


def check_cluster(address: str | None) -> None:
    """Raises InputError, within ten seconds, where the cluster that would be joined cannot be."""
    if address := joins(address):
        use_token()
        if address not in ("auto", "local"):
            check_head(address)


def _start(cpus: float, say: Callable[[str], None]) -> None:
    """A Ray of this run's own, for this user alone: it listens on the loopback interface only, wants a token that is
    made here and is in the environment of its processes only, and has its files in a folder closed to others."""
    here = os.cpu_count() or 1
    if cpus > here:
        say(f"the workers ask for {cpus:g} CPUs and this machine has {here}: they will share them")
    folder = ray_folder(say)
    with own_environment(), _few_processes():
        ray_constants.ENABLE_RAY_CLUSTER = False  # at import that variable was read
        read_environment()
        ray.init(
            "local", num_cpus=max(here, math.ceil(cpus)), include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR, _temp_dir=folder,
        )  # fmt: skip


@contextmanager
def own_environment() -> Iterator[None]:
    """What the processes of a Ray of this run's own find in their environment, where the user has not set it. To be
    entered in the main thread where another one starts Ray: a variable that vanishes fails whoever copies all of them.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {**OWN_RAY, **_token(), LOOPBACK: "0"}
    before = {name: os.environ[name] for name in own if name in os.environ}
    os.environ.update({**own, **before, LOOPBACK: "0"})
    try:
        yield
    finally:
        for name in own.keys() - before.keys():
            os.environ.pop(name)
        os.environ.update(before)


class _Node(ray_node.Node):
    """Without the processes that a Ray of one driver has no use for: an autoscaler's monitor, what forwards logs to
    drivers, and the dashboard's server, which starts even where it is turned off. They take a second of a core."""

    def start_monitor(self) -> None:
        pass

    def start_log_monitor(self) -> None:
        pass

    def start_api_server(self, **options: Any) -> None:
        """Its address has to be there all the same: Ray's agent asks for it every second, and logs an error."""
        del options
        self._webui_url, key = "", ray_constants.DASHBOARD_ADDRESS.encode()
        head: Any = self.get_gcs_client()
        head.internal_kv_put(key, b"127.0.0.1:0", True, namespace=ray_constants.KV_NAMESPACE_DASHBOARD)


@contextmanager
def _few_processes() -> Iterator[None]:
    """Nodes that are started meanwhile do without some, see `_Node`."""
    usual = ray_node.Node
    ray_node.Node = _Node
    try:
        yield
    finally:
        ray_node.Node = usual


def _token() -> dict[str, str]:
    """Environment for token authentication, unless the user has decided otherwise; with a token of this run's own,
    unless the user has set one in the environment: Ray would write one into the home directory."""
    mode = {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
    if mode["RAY_AUTH_MODE"].lower() != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return mode
    return {**mode, "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def ray_folder(say: Callable[[str], None]) -> str:
    """Where Ray is to have its files: in the temporary directory, or in a shorter one where its sockets' paths would be
    too long, in a folder that others may not enter. Raises InputError where there is none."""
    wanted = get_default_system_temp_dir()
    for place in (wanted, *FOLDERS):
        folder = Path(place).absolute() / f"metadist-{os.getuid()}"
        if len(os.fsencode(folder / "ray")) > LONGEST_FOLDER:
            continue
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.lstat().st_uid != os.getuid() or folder.is_symlink():
                continue
            folder.chmod(0o700)
        except OSError:
            continue
        if place != wanted:
            say(f"Ray's files are in {folder}: the path {wanted} is too long for its sockets, or cannot be used")
        return str(folder / "ray")
    raise InputError(
        f"Ray cannot have its files in {wanted}: set RAY_TMPDIR to a folder that you may write to, with a path of at "
        f"most {LONGEST_FOLDER - 20} characters"
    )


def disconnect(lost: bool = False) -> None:
    """Leave the cluster; one that `connect` started ends. `lost`: its head does not answer, so there is nobody to take
    leave of, which Ray would wait for."""
    if lost:
        atexit.unregister(ray.shutdown)
        return
    ray.shutdown()
    ray_constants.ENABLE_RAY_CLUSTER = True
    read_environment()


def exit_without_head(code: int) -> NoReturn:
    """End this process, and a Ray of its own, after `disconnect(lost=True)`: without a head Ray's part of an ordinary
    exit crashes or hangs."""
    node: Any = ray_worker._global_node
    if node is not None:
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    sys.stdout.flush()
    os._exit(code)


class HeadWatch:
    """Asks the head for a sign of life every second, in a thread. `say` is called when it is silent and when it answers
    again; from `give_up_s` of silence on `check` raises HeadLost. Where the driver cannot end by that, as it waits for
    something that will never come, the process is ended with the same sentence before Ray does so without one."""

    def __init__(self, say: Callable[[str], None], give_up_s: float):
        self._say, self._give_up_s = say, give_up_s
        self._address = ray.get_runtime_context().gcs_address
        self._client = GcsClient(address=self._address)
        self._silent_s = 0.0
        self._closed = threading.Event()
        self.draining: frozenset[str] = frozenset()
        """Ids of the nodes that will be taken away."""
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._watch, self._look)]
        for thread in self._threads:
            thread.start()

    @property
    def answers(self) -> bool:
        """Whether it does: else whatever asks it something waits, for ever if it is gone."""
        return not self._silent_s

    @property
    def lost(self) -> bool:
        """Whether the head has been given up."""
        return self._silent_s >= self._give_up_s

    def check(self) -> None:
        """Raises HeadLost once the head has been given up."""
        if self.lost:
            raise HeadLost(f"{self._sentence()}: start Ray again, then begin again")

    def close(self) -> None:
        """Look no more; nothing of it is under way when this returns, unless the head is silent."""
        self._closed.set()
        for thread in self._threads:
            thread.join(0 if self._silent_s else 2 * HEAD_ANSWER_S)

    def _sentence(self) -> str:
        return f"Ray's head at {self._address} has not answered for {self._silent_s:.0f} s"

    def _watch(self) -> None:
        said_so = False
        while not self._closed.wait(ASK_EVERY_S):
            began = time.monotonic()
            if self._answers():
                if said_so:
                    self._say(f"Ray's head answers again, after {self._silent_s:.0f} s: the run goes on")
                said_so, self._silent_s = False, 0.0
                continue
            # by steps that are short also where this process was stopped meanwhile
            self._silent_s += ASK_EVERY_S + min(time.monotonic() - began, 2 * HEAD_ANSWER_S)
            if self._silent_s >= SAY_AFTER_S and not said_so:
                said_so = True
                self._say(f"{self._sentence()}: after {self._give_up_s:.0f} s the run is saved and ends")
            if self._silent_s >= EXIT_S and not self._closed.is_set():
                self._say(f"{self._sentence()}, and this process waits for it in vain: it ends here; "
                          f"start Ray again, then {doing_it_again()} goes on from the newest checkpoint")  # fmt: skip
                os._exit(1)

    def _look(self) -> None:
        while not self._closed.wait(DRAIN_EVERY_S):
            with suppress(RpcError, RayError):  # of a head that does not answer, which `_watch` tells
                # there is no public call for it; Ray's own libraries use this one
                self.draining = frozenset(state.get_draining_nodes())

    def ask(self) -> bool:
        """Whether the head answers now, within the second or two that it is given."""
        return not self._silent_s and self._answers()

    def _answers(self) -> bool:
        try:
            self._client.internal_kv_exists(b"metadist", b"metadist", timeout=HEAD_ANSWER_S)
        except (RpcError, RayError):
            return False
        return True


class Writer:
    """Stands for the one driver that may write checkpoints in a place; it ends with that driver."""

    def __init__(self, holder: str) -> None:
        self._holder = holder

    def holder(self) -> str:
        """Which driver that is."""
        return self._holder


def claim(place: str, holder: str, patience_s: float = 10.0) -> Any:
    """The right to write checkpoints in a place that no lock file can guard, against other drivers of this cluster, for
    as long as what is returned is kept. Raises InputError that names the one that has it; one that was just killed
    has `patience_s` to be noticed."""
    name = f"writer-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # it dies as the driver
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "memory": SLIVER, "max_restarts": 0}
    options["scheduling_strategy"] = here
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return ray.remote(Writer).options(**options).remote(holder)
        except ValueError:
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            other = _holder(name)
            raise InputError(
                f"{place} is in use by another driver{other}: wait until it ends, stop it, or set checkpoint.location"
            ) from None


def _holder(name: str) -> str:
    try:
        return f" ({ray.get(ray.get_actor(name, NAMESPACE).holder.remote(), timeout=5)})"
    except (ValueError, RayError):
        return ""
