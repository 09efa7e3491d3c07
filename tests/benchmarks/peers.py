"""metadist beside its peers on this machine: speed, memory, and learn2learn's Omniglot pipeline end to end.

    python tests/benchmarks/peers.py --quick
    python tests/benchmarks/peers.py --omniglot FOLDER_OF_THE_TWO_ZIPS --out results.json > results.md

Every contender computes the same network on the same tasks from the same initial weights in a process of its own; their
first query loss and meta-gradient norm must agree to 1e-3 before any speed is printed. Rounds are interleaved: in each,
every contender runs once, in turn. Single processes run with one thread and with two, and the better setting counts;
what runs on Ray or under torchrun has two processes of one thread. What cannot run here is listed with the
reason.
"""

import argparse
import json
import platform
import shlex
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peer_report
from peer_environments import CannotInstall, Environment, prepare
from peer_runs import Runner, omniglot_for_learn2learn, omniglot_for_metadist

SCRIPTS = Path(__file__).resolve().parent / "peer_scripts"
sys.path.insert(0, str(SCRIPTS))
from workloads import HEADLINE, MEMORY, OMNIGLOT, WORKLOADS, Workload, write_inputs  # noqa: E402

ENVIRONMENTS = {
    "learn2learn": Environment(
        ("numpy==1.26.4", "scipy==1.17.1", "pillow==12.3.0", "requests==2.34.2", "tqdm==4.70.1",
         "Cython==0.29.37", "setuptools==84.2.1"),
        # Its own requirements ask for gsutil and qpth, which MAML does not import. torchvision's releases for a newer
        # torch do not load beside a torch of another build (CPU, CUDA); this one does, and its Omniglot is the same.
        alone=("torchvision==0.16.2", "gym==0.26.2", "gym-notices==0.1.0", "cloudpickle==3.1.2"),
        source="learn2learn==0.2.0",
    ),
    "higher": Environment(("numpy==1.26.4", "higher==0.2.1")),
    "TorchOpt": Environment(("numpy==1.26.4", "torchopt==0.7.3", "optree==0.20.0")),
    "JAX": Environment(("numpy==2.4.6", "scipy==1.17.1", "jax==0.10.2", "jaxlib==0.10.2", "optax==0.2.8")),
}  # fmt: skip
"""Peers in environments of their own, torch being the one that runs this; the others run in this one."""


@dataclass(frozen=True)
class Contender:
    """A script of `peer_scripts`, and how it is run."""

    name: str
    script: str
    environment: str | None = None
    threads: tuple[int, ...] = (1, 2)
    processes: int = 1
    settings: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()  # what the interpreter is given before the script
    left_out: str = ""  # a network that it is not measured on
    reason: str = ""

    @property
    def is_metadist(self) -> bool:
        return self.script == "metadist_system.py"


ROUNDING = "its rounding moves the norm of this gradient by 0.3 %; on smaller images it agrees in float64 to 1e-13"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PEERS = (
    Contender("learn2learn", "learn2learn_maml.py", "learn2learn"),
    Contender("higher", "higher_maml.py", "higher"),
    Contender("TorchOpt", "torchopt_maml.py", "TorchOpt"),
    Contender("torch.func vmap", "vmap_maml.py"),
    Contender("hand-written loop", "loop_maml.py"),
    Contender("hand-written loop on Ray", "ray_loop.py", threads=(1,), processes=2),
    Contender("hand-written loop under torchrun", "torchrun_loop.py", threads=(1,), processes=2, launcher=TORCHRUN),
    Contender("JAX", "jax_maml.py", "JAX", left_out="resnet12", reason=ROUNDING),
)
ONE_PROCESS = "fleet.backend=local", "engine.chunk_size=null"
"""With chunks of the default size, as a workload's own size is for two workers."""
METADIST = {
    "metadist": (),
    "metadist compiled": ("engine.compile=true",),
    "metadist in one process": ONE_PROCESS,
    "metadist compiled in one process": (*ONE_PROCESS, "engine.compile=true"),
}
METADIST_MEMORY = {
    "metadist": (),
    "metadist remat": ("engine.differentiation=remat",),
}


def metadist(name: str, *settings: str) -> Contender:
    local = "fleet.backend=local" in settings
    threads, processes = ((1, 2), 1) if local else ((1,), 2)
    return Contender(name, "metadist_system.py", None, threads, processes, settings)


def contenders(args: argparse.Namespace, memory: bool = False) -> list[Contender]:
    """Who takes part: peers, then metadist with the settings asked for. Memory is measured in one process each."""
    named = METADIST_MEMORY if memory else METADIST
    named = {name: tuple(settings) for name, *settings in args.variant} if args.variant else named
    local = ("fleet.backend=local",) if memory else ()
    own = [metadist(name, *local, *settings, *args.override) for name, settings in named.items()]
    peers = [peer for peer in PEERS if not memory or peer.processes == 1]
    return [each for each in (*peers, *own) if not args.only or each.name in args.only]


def main() -> int:
    args = command_line()
    peer_report.heading(results := describe())
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), SCRIPTS, interpreters(args), args.seconds, args.limit)
        for workload in WORKLOADS:
            if workload.name in args.workload:
                results["workloads"][workload.name] = measure(runner, workload, contenders(args), args.rounds)
                peer_report.speeds(results["workloads"][workload.name])
        if "memory" in args.workload:
            results["memory"] = [memory(runner, workload, contenders(args, memory=True)) for workload in MEMORY]
            peer_report.memory(results["memory"])
        if "omniglot" in args.workload:
            results["omniglot"] = omniglot(runner, args)
            peer_report.omniglot(results["omniglot"])
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))
    return 1 if peer_report.disagreements(results) else 0


def command_line() -> argparse.Namespace:
    parts = [*(workload.name for workload in WORKLOADS), "memory", "omniglot"]
    names = [*(peer.name for peer in PEERS), *METADIST, *METADIST_MEMORY]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 2 s, the headline workload only")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(dict.fromkeys(names))}")
    parser.add_argument("--workload", nargs="+", choices=parts, metavar="NAME", help=f"of {', '.join(parts)}")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--seconds", type=float, help="of each measurement; default 5")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="after which a run is given up")
    parser.add_argument("--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="settings of metadist in all of its runs")  # fmt: skip
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"),
                        help="metadist with these settings, instead of the usual variants; may repeat")  # fmt: skip
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "metadist" / "peers", metavar="DIR")
    parser.add_argument("--omniglot", type=Path, metavar="DIR", help="images_background.zip and images_evaluation.zip")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of every run")
    args = parser.parse_args()
    unknown = set(args.only) - set(names) - {variant[0] for variant in args.variant}
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}; known: {', '.join(dict.fromkeys(names))}")
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.seconds = args.seconds or (2.0 if args.quick else 5.0)
    args.workload = args.workload or ([HEADLINE.name] if args.quick else parts)
    return args


def describe() -> dict[str, Any]:
    """Machine, versions, date and command."""
    packages = ("metadist", "torch", "ray", "numpy")
    return {
        "machine": peer_report.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "tests/benchmarks/peers.py", *sys.argv[1:]]),
        "workloads": {},
    }


def interpreters(args: argparse.Namespace) -> dict[str | None, Path | str]:
    """Interpreter of each environment that is needed, or the reason why there is none."""
    found: dict[str | None, Path | str] = {None: Path(sys.executable)}
    for name in {each.environment for each in contenders(args) if each.environment}:
        try:
            found[name] = prepare(name, ENVIRONMENTS[name], version("torch"), args.envs.expanduser().resolve(), say)
        except CannotInstall as error:
            found[name] = str(error)
    return found


def measure(runner: Runner, workload: Workload, who: list[Contender], rounds: int) -> dict[str, Any]:
    """Every contender, at each of its thread counts, once a round."""
    tasks = write_inputs(workload, runner.folder / f"{workload.name}.npz")
    runs = []
    for turn in range(rounds):
        for each in who:
            for threads in each.threads:
                left_out = {"threads": threads, "error": each.reason} if workload.network == each.left_out else None
                figures = left_out or runner.run(each, workload, threads, "--tasks", str(tasks))
                runs.append({"round": turn, "name": each.name, "processes": each.processes,
                             "metadist": each.is_metadist, **figures})  # fmt: skip
                say(f"{workload.name}, round {turn + 1} of {rounds}: {peer_report.brief(runs[-1])}")
    return {"workload": workload.asdict(), "description": workload.describe(), "runs": runs}


def memory(runner: Runner, workload: Workload, who: list[Contender]) -> dict[str, Any]:
    """One thread, a few meta-steps of one task: how far memory rises."""
    one = [Contender(**{**vars(each), "threads": (1,)}) for each in who]
    runner.seconds, kept = 0.0, runner.seconds
    try:
        return measure(runner, workload, one, rounds=1)
    finally:
        runner.seconds = kept


def omniglot(runner: Runner, args: argparse.Namespace) -> dict[str, Any]:
    """From image files (learn2learn) or the imported table (metadist) to a trained batch, and sampling alone."""
    if args.omniglot is None:
        return {"reason": "no --omniglot DIR with images_background.zip and images_evaluation.zip was given"}
    root = args.envs.expanduser().resolve()
    peer = Contender("learn2learn", "learn2learn_omniglot.py", "learn2learn")
    data = {peer.name: str(omniglot_for_learn2learn(args.omniglot, root / "omniglot-learn2learn"))}
    own = [each for each in contenders(args) if each.is_metadist and each.processes == 2]
    data |= dict.fromkeys((e.name for e in own), str(omniglot_for_metadist(args.omniglot, root / "omniglot-metadist")))
    who = [each for each in (peer, *own) if not args.only or each.name in args.only]
    if peer in who:
        say("learn2learn indexes its files, once")
        runner.run(peer, OMNIGLOT, 1, "--data", data[peer.name], "--sample-only")
    runs = []
    for turn in range(args.rounds):
        for each in who:
            modes = [(threads, ()) for threads in each.threads]
            for threads, mode in [*modes, (1, ("--sample-only",))]:
                figures = runner.run(each, OMNIGLOT, threads, "--data", data[each.name], *mode)
                runs.append({"round": turn, "name": each.name, "processes": 1 if mode else each.processes,
                             "metadist": each.is_metadist, "sampling": bool(mode), **figures})  # fmt: skip
                say(f"omniglot, round {turn + 1} of {args.rounds}: {peer_report.brief(runs[-1])}")
    return {"workload": OMNIGLOT.asdict(), "description": OMNIGLOT.describe(), "runs": runs}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
