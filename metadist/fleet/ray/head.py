"""Whether the head of the Ray cluster still answers: without it Ray ends the driver after a minute, without a word."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import ray
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayError, RpcError

from metadist.core.errors import HeadLost
from metadist.fleet.ray.workers import draining_nodes

EVERY_S, ANSWER_S = 1.0, 1.5
TOLD_S = 3.0
DRAIN_EVERY_S = 3.0
GIVE_UP_S = 40.0  # a cluster's head may be restarted, or its link mended, meanwhile
OWN_GIVE_UP_S = 20.0  # nobody restarts that of a Ray of our own
EXIT_S = 54.0  # before Ray does it (RAY_gcs_rpc_server_reconnect_timeout_s, 60)


class HeadWatch:
    """Asks the head for a sign of life every second, in a thread. `say` is told when it is silent and when it answers
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
            raise HeadLost(f"{self._sentence()}: start Ray again, then repeat the command")

    def close(self) -> None:
        """Look no more; nothing of it is under way when this returns, unless the head is silent."""
        self._closed.set()
        for thread in self._threads:
            thread.join(0 if self._silent_s else 2 * ANSWER_S)

    def _sentence(self) -> str:
        return f"Ray's head at {self._address} has not answered for {self._silent_s:.0f} s"

    def _watch(self) -> None:
        told = False
        while not self._closed.wait(EVERY_S):
            began = time.monotonic()
            if self._answers():
                if told:
                    self._say(f"Ray's head answers again, after {self._silent_s:.0f} s: the run goes on")
                told, self._silent_s = False, 0.0
                continue
            # by steps that are short also where this process was stopped meanwhile
            self._silent_s += EVERY_S + min(time.monotonic() - began, 2 * ANSWER_S)
            if self._silent_s >= TOLD_S and not told:
                told = True
                self._say(f"{self._sentence()}: after {self._give_up_s:.0f} s the run is saved and ends")
            if self._silent_s >= EXIT_S and not self._closed.is_set():
                self._say(f"{self._sentence()}, and this process waits for it in vain: it ends here; "
                          "start Ray again, then the same command with --resume auto goes on from the newest "
                          "checkpoint")  # fmt: skip
                os._exit(1)

    def _look(self) -> None:
        while not self._closed.wait(DRAIN_EVERY_S):
            with suppress(RpcError, RayError):  # of a head that does not answer, which `_watch` tells
                self.draining = draining_nodes()

    def _answers(self) -> bool:
        try:
            self._client.internal_kv_exists(b"metadist", b"metadist", timeout=ANSWER_S)
        except (RpcError, RayError):
            return False
        return True
