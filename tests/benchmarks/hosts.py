"""Several hosts on one machine, each with a network, processes and a name of its own; a cut link, a power failure.

Linux namespaces, so root only. One host runs whatever it is told: a node of Ray, an S3 server, MLflow, a person's
laptop. They see each other through a bridge and nothing else.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

NEEDED = ("ip", "unshare", "nsenter")
_SET_UP = """
hostname "$0"; mkdir -p /tmp/ray "$1"; mount --bind "$1" /tmp/ray; mount -t tmpfs -o size=512m tmpfs /dev/shm
shift; "$@"; exit $?
"""


def why_not() -> str | None:
    """Why there can be no such hosts here, if so."""
    if os.geteuid() != 0:
        return "hosts of their own need root"
    if absent := [tool for tool in NEEDED if not shutil.which(tool)]:
        return f"no {absent[0]} (Debian: iproute2, util-linux)"
    probe = ["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "--mount-proc", "ip", "link", "add", "name",
             "probe", "type", "bridge"]  # fmt: skip
    done = subprocess.run(probe, capture_output=True, text=True)
    return None if done.returncode == 0 else f"no namespaces with a bridge here ({done.stderr.strip()})"


class Hosts:
    """The hosts of one test, as a context: leaving it ends all that runs on them."""

    def __init__(self, folder: Path, net: str = "10.78.0", prefix: str | None = None):
        self.folder = folder
        self._net, self._prefix = net, prefix or f"md{os.getpid()}"
        self._hosts: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._logs: list[IO[bytes]] = []

    def __enter__(self) -> "Hosts":
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "name", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._hosts):
            self.power_off(name)
        subprocess.run(["ip", "netns", "del", self._switch], check=False)
        for log in self._logs:
            log.close()

    @property
    def _switch(self) -> str:
        return f"{self._prefix}-switch"

    def add(self, name: str, number: int) -> str:
        """Plug in a host; its address."""
        space, link, address = f"{self._prefix}-{name}", f"v-{name}", f"{self._net}.{number}"
        _ip("netns", "add", space)
        _ip("-n", self._switch, "link", "add", "name", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", self._switch, "link", "set", link, "master", "br0", "up")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "route", "add", "default", "dev", "eth0")
        self._hosts[name] = []
        return address

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command on a host as a machine of its own: its processes, /tmp/ray and shared memory are not seen
        elsewhere, and end with it. Output goes to `folder/NAME.log`."""
        log = (self.folder / f"{name}.log").open("ab")
        self._logs.append(log)
        machine = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--mount-proc", "bash", "-c",
                   _SET_UP, name, str(self.folder / name), *command]  # fmt: skip
        process = subprocess.Popen(
            ["ip", "netns", "exec", f"{self._prefix}-{name}", *machine], env={**os.environ, **(environment or {})},
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._hosts[name].append(process)
        return process

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """The command line that runs a command with a host's network alone."""
        return ["ip", "netns", "exec", f"{self._prefix}-{name}", *command]

    def log(self, name: str) -> str:
        """What has been printed there."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, name: str, text: str, timeout_s: float = 90) -> None:
        """Until the host's log has the text. Raises TimeoutError with the log."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log(name):
            if time.monotonic() > deadline or any(p.poll() is not None for p in self._hosts[name]):
                raise TimeoutError(f"{name} has not said {text!r}:\n{self.log(name)}")
            time.sleep(0.2)

    def cut(self, name: str) -> None:
        """Unplug its link."""
        _ip("-n", self._switch, "link", "set", f"v-{name}", "down")

    def heal(self, name: str) -> None:
        """Plug its link in again."""
        _ip("-n", self._switch, "link", "set", f"v-{name}", "up")

    def power_off(self, name: str) -> None:
        """End all that runs there at once, without notice, and unplug it for good."""
        space = f"{self._prefix}-{name}"
        found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
        for number in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)
        for process in self._hosts.pop(name):
            process.wait()
        subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
        subprocess.run(["ip", "-n", self._switch, "link", "del", f"v-{name}"], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
