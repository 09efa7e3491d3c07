"""What `metadist doctor` looks at on one machine, without starting anything: versions, token, ports, GPUs, room."""

import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from metadist.core.files import reason

PACKAGES = ("ray", "torch", "metadist")
LISTENERS = ("gcs_server", "raylet", "dashboard/dashboard.py", "ray.util.client.server")
LISTENING, ANYWHERE = "0A", ("00000000", "00000000000000000000000000000000")  # in /proc/net/tcp and tcp6
FREE_BYTES, FULL = 5 << 30, 0.95  # Ray stops spilling to a disk that is fuller
SHARED_BYTES = 1 << 30
OPEN_FILES = 4096  # below which Ray itself warns
GIB = 1 << 30


class Finding(NamedTuple):
    """One thing that was looked at: whether it is well, what it is, what to do where it is not; `node`: the host."""

    status: Literal["ok", "warn", "fail"]
    what: str
    remedy: str = ""
    node: str = ""


def versions() -> dict[str, str]:
    """Python's and those of the packages that all nodes need alike; "missing" for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def examine() -> list[Finding]:
    """Everything about this machine but its versions, in a fixed order."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        token,
        listening,
        gpus,
        disk,
        shared_memory,
        data_cache,
        open_files,
    ]
    host = socket.gethostname()
    return [finding._replace(node=host) for check in checks for finding in check()]


def token_file() -> Path:
    """Where Ray looks for the token of a cluster."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def mode_of(path: Path) -> int:
    """Who may do what with a file, as `chmod` takes it."""
    return stat.S_IMODE(path.stat().st_mode)


def token() -> Iterator[Finding]:
    mode, path = os.environ.get("RAY_AUTH_MODE", "").lower(), token_file()
    if mode == "disabled":
        yield Finding(
            "warn", "Ray's authentication is switched off (RAY_AUTH_MODE=disabled)",
            "whoever reaches the head's ports may run any code: unset it, and give all nodes one token",
        )  # fmt: skip
        return
    if "RAY_AUTH_TOKEN" in os.environ:
        yield Finding("ok", "Ray's token is in RAY_AUTH_TOKEN")
    elif not path.exists():
        status, what = ("fail", "is not there") if mode == "token" else ("ok", "is not there (one is made at need)")
        yield Finding(status, f"Ray's token file {path} {what}", "to join a cluster copy its ~/.ray/auth_token there")
    elif mode_of(path) & 0o077:
        yield Finding(
            "warn", f"Ray's token file {path} can be used by others (mode {mode_of(path):04o})", f"chmod 600 {path}"
        )
    else:
        yield Finding("ok", f"Ray's token is in {path}, readable by this user alone")


def listening() -> Iterator[Finding]:
    """Whether processes of Ray that this user may look into take connections from other machines without a token."""
    if not Path("/proc/net/tcp").exists():
        yield Finding("ok", "what Ray's processes listen to is not looked at on this system")
        return
    places = _listening_sockets()
    for pid, name in _ray_processes():
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        ports = sorted({places[link] for link in links if link in places})
        public = [port for address, port in ports if address in ANYWHERE]
        guarded = b"ray_auth_mode=token" in environment.lower().split(
            b"\0"
        )  # `ray start` sets it where it finds a token
        if public and not guarded:
            numbers = ", ".join(map(str, public))
            yield Finding(
                "warn", f"{name} (process {pid}) takes connections from any machine, without a token: port {numbers}",
                "set RAY_AUTH_MODE=token for `ray start` on every node, or let it listen on 127.0.0.1",
            )  # fmt: skip
        elif ports:
            how = "with a token" if guarded else "from this machine"
            yield Finding("ok", f"{name} (process {pid}) takes connections {how}")


def _ray_processes() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:3]
            except OSError:
                continue
            name = next((each for each in LISTENERS if any(word.endswith(each) for word in words)), None)
            if name:
                yield int(folder.name), Path(name).stem


def _listening_sockets() -> dict[str, tuple[str, int]]:
    """Address, as the kernel writes it, and port of each socket that waits for connections, by its file's name."""
    found = {}
    for table in ("tcp", "tcp6"):
        lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:] if Path(f"/proc/net/{table}").exists() else []
        for fields in (line.split() for line in lines):
            if fields[3] == LISTENING:
                address, _, port = fields[1].partition(":")
                found[f"socket:[{fields[9]}]"] = (address, int(port, 16))
    return found


def gpus() -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        yield Finding("ok", "no NVIDIA GPU (there is no nvidia-smi)")
        return
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("fail", f"nvidia-smi does not answer ({reason(error)})", "the driver hangs: restart the machine")
        return
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[:200]
        yield Finding("fail", f"nvidia-smi fails: {said}", "install the driver that fits the kernel, or restart")
        return
    rows = [row.split(", ") for row in done.stdout.splitlines() if row.strip()]
    for name, driver, total, free in rows:
        yield Finding("ok", f"GPU {name}, driver {driver}, {free} of {total} MiB free")
    if rows and "+cpu" in versions()["torch"]:
        yield Finding("warn", "torch is a build for CPUs, so the GPUs are of no use", "install torch's CUDA build")


def disk() -> Iterator[Finding]:
    """Where Ray has its files, and where this command runs."""
    places = {"Ray's files": os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "this directory": os.getcwd()}
    for what, place in places.items():
        used = shutil.disk_usage(place)
        text = f"disk of {what} ({place}): {used.free / GIB:.1f} of {used.total / GIB:.1f} GiB free"
        full = 1 - used.free / used.total > FULL
        if full or used.free < FREE_BYTES:
            yield Finding("fail" if full else "warn", text, "make room: from 95 % on Ray cannot spill objects")
        else:
            yield Finding("ok", text)


def shared_memory() -> Iterator[Finding]:
    place = Path("/dev/shm")
    if not place.is_dir():
        yield Finding("ok", "no /dev/shm: Ray keeps objects in files")
        return
    size = shutil.disk_usage(place)
    text = f"shared memory {place}: {size.free / GIB:.2f} of {size.total / GIB:.2f} GiB free"
    if size.free < SHARED_BYTES:
        remedy = "docker run --shm-size=4g, or an emptyDir of medium Memory in Kubernetes; else objects are on disk"
        yield Finding("warn", text, remedy)
    else:
        yield Finding("ok", text)


def data_cache() -> Iterator[Finding]:
    place = Path(os.environ.get("METADIST_CACHE") or Path.home() / ".cache" / "metadist").absolute()
    there = next(each for each in (place, *place.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield Finding("fail", f"data cache {place} cannot be written to", "set METADIST_CACHE to a directory that can")
        return
    free = shutil.disk_usage(there).free
    status = "ok" if free > FREE_BYTES else "warn"
    remedy = "" if status == "ok" else "make room, or set METADIST_CACHE to a larger disk"
    yield Finding(status, f"data cache {place}: {free / GIB:.1f} GiB free", remedy)


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = soft if hard == resource.RLIM_INFINITY else hard  # to which Ray raises its own
    text = f"open files: {soft} allowed, {'any number' if hard == resource.RLIM_INFINITY else hard} at most"
    few = 0 <= most < OPEN_FILES
    yield Finding("warn" if few else "ok", text, "raise it (ulimit -n 65536) before `ray start`" if few else "")
