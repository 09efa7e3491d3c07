"""A Slurm cluster on this machine: a controller, and nodes that are network namespaces with addresses of their own."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NET = "10.79.0"
FIRST_JOB = 70000 + os.getpid() % 10000
TOOLS = ("sbatch", "slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
CONFIGURATION = """
ClusterName=metadist
SlurmctldHost={host}({net}.254)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
FirstJobId={first}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=5
MpiDefault=none
ReturnToService=2
KillWait=30
MinJobAge=600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0
"""


def why_not() -> str:
    """Why this machine cannot have one; empty if it can."""
    if os.geteuid() != 0:
        return "Slurm on namespaces needs root"
    lacking = [tool for tool in TOOLS if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    return f"there is no {', '.join(lacking)} here: apt-get install slurm-wlm munge iproute2" if lacking else ""


class Slurm:
    """Commands for it, as a user types them; `folder` is shared by its nodes, for they have one file system."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"
        }  # fmt: skip

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """Of `scontrol show job`."""
        return dict(word.partition("=")[::2] for word in self.run("scontrol", "show", "job", job).split())[name]


@contextmanager
def slurm(folder: Path, nodes: int, cpus: int) -> Iterator[Slurm]:
    """Start one with so many nodes, each as if it had `cpus` CPUs; all that was started ends with the block."""
    names = [f"n{number}" for number in range(1, nodes + 1)]
    address = {name: f"{NET}.{number}" for number, name in enumerate(names, start=11)}
    cluster, started = Slurm(folder), []
    ray = Path(f"/tmp/ray-{FIRST_JOB}")  # the one folder that nodes do not share: there Ray has its files
    ray.mkdir()
    for name in ("state", *names):
        (folder / name / "tmp").mkdir(parents=True)
    lines = [f"NodeName={name} NodeAddr={address[name]} CPUs={cpus} State=UNKNOWN" for name in names]
    host = os.uname().nodename.partition(".")[0]
    text = CONFIGURATION.format(
        host=host, net=NET, port=26817, node_port=26818, folder=folder, nodes="\n".join(lines),
        first=FIRST_JOB,
    )  # fmt: skip
    (folder / "slurm.conf").write_text(text)
    hosts = [f"{place} {name}" for name, place in address.items()]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{NET}.254 {host}", *hosts, ""]))
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)

    def start(name: str, *command: str) -> None:
        with (folder / f"{name}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log))

    try:
        _network(cluster, names, address)
        start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
              f"--key-file={folder}/munge.key", f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log",
              f"--seed-file={folder}/munge.seed")  # fmt: skip
        _wait(lambda: (folder / "munge.socket").exists(), "munged")
        start("slurmctld", "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for name in names:
            inside = f"hostname {name}; mount --bind {folder}/hosts /etc/hosts; mount --bind {folder}/{name}/tmp {ray}"
            start(name, "nsenter", f"--net=/run/netns/metadist-{name}", "unshare", "--mount", "--uts", "--pid",
                  "--fork", "--kill-child", "--mount-proc", "bash", "-c",
                  f"{inside}; exec slurmd -D -N {name} -f {folder}/slurm.conf")  # fmt: skip
        _wait(lambda: cluster.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(nodes), "the nodes")
        yield cluster
    finally:
        for process in reversed(started):
            process.kill()  # of a node: all in its process namespace, with it
            process.wait()
        _no_network(names)
        ray.rmdir()
        shutil.rmtree(folder)


def _network(cluster: Slurm, names: list[str], address: dict[str, str]) -> None:
    _no_network(names)
    cluster.run("ip", "link", "add", "metadist-br", "type", "bridge")
    cluster.run("ip", "addr", "add", f"{NET}.254/24", "dev", "metadist-br")
    cluster.run("ip", "link", "set", "metadist-br", "up")
    for name in names:
        space = f"metadist-{name}"
        cluster.run("ip", "netns", "add", space)
        cluster.run("ip", "link", "add", f"md-{name}", "type", "veth", "peer", "name", "eth0", "netns", space)
        cluster.run("ip", "link", "set", f"md-{name}", "master", "metadist-br", "up")
        for command in (
            ["link", "set", "lo", "up"], ["addr", "add", f"{address[name]}/24", "dev", "eth0"],
            ["link", "set", "eth0", "up"], ["route", "add", "default", "via", f"{NET}.254"],
        ):  # fmt: skip
            cluster.run("ip", "-n", space, *command)


def _no_network(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", f"metadist-{name}"], stderr=subprocess.DEVNULL, check=False)
    subprocess.run(["ip", "link", "del", "metadist-br"], stderr=subprocess.DEVNULL, check=False)


def _wait(what: Callable[[], bool], name: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"{name} did not start within {seconds:g} s"
        time.sleep(0.5)
