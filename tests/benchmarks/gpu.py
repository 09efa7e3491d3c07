"""One GPU against every recipe on it, and against its own floor: `python tests/benchmarks/gpu.py [--out FILE]`.

Conv4-64 on 28x28, 5-way 1-shot, 15 queries per class, one second-order inner step, meta-batch 32; tasks lie on the GPU
beforehand for all. metadist is its engine and plain Adam, in each way it can compute; the others are the scripts of
`peers.py`, those whose package this Python has. The floor: the work of one task, counted by torch, at the rate the card
multiplies large float32 matrices, and the bytes its products and convolutions read and write at the rate it copies.
Then 64 second-order inner steps of a ResNet-12. Takes less than eight minutes; without a GPU it says so and stops.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from metadist import MAML, Engine, Model, Task
from metadist.engine import Method, estimate
from metadist.fleet.worker import set_up_process
from metadist.models import Conv4, ResNet12
from metadist.models.losses import cross_entropy

SCRIPTS = Path(__file__).parent / "peer_scripts"
sys.path.insert(0, str(SCRIPTS))
from workloads import HEADLINE, read_tasks, write_inputs  # noqa: E402

PEERS = {"loop_maml": "torch", "vmap_maml": "torch", "learn2learn_maml": "learn2learn", "higher_maml": "higher",
         "torchopt_maml": "torchopt"}  # fmt: skip
METHODS = {
    "loop": Method("loop"),
    "loop, CUDA graph": Method("loop", captured=True),
    "vmap": Method("vmap"),
    "vmap, CUDA graph": Method("vmap", captured=True),
    "vmap, CUDA graph, bfloat16": Method("vmap", captured=True, autocast=True),
    "vmap, compiled": Method("vmap", compiled=True),
}


def rate(step: Callable[[], Any], seconds: float, device: str) -> float:
    """Calls a second, after twenty to warm up."""
    for _ in range(20):  # past the calls after which an engine plays back
        step()
    wait(device)
    began, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - began < seconds:
        step()
        wait(device)
        calls += 1
    return calls / (time.perf_counter() - began)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def floors(device: str, seconds: float) -> tuple[float, float]:
    """Floating point operations a second of a large float32 product, bytes a second of a copy (read and written)."""
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device)
    source = torch.empty(1 << (30 if device == "cuda" else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products = rate(lambda: a @ b, seconds, device)
    return products * 2 * size**3, rate(lambda: target.copy_(source), seconds, device) * 2 * source.numel()


def work_of_a_task(tasks: list[Task], module: Callable[[], torch.nn.Module]) -> tuple[int, int]:
    """Floating point operations of one task's meta-gradient, and bytes that its products and convolutions read and
    write: all else could be done on the way."""
    engine = Engine(MAML(model=Model(module()), loss=cross_entropy, inner_lr=HEADLINE.inner_lr))
    with FlopCounterMode(display=False) as counter:
        engine.meta_gradients(engine.initial_theta(), tasks[:1])
    nodes = [node for node in engine.operations(tasks[:1]) if any(name in str(node.target) for name in ("conv", "mm"))]
    values = [other.meta.get("val") for node in nodes for other in (node, *node.all_input_nodes)]
    tensors = [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]
    return counter.get_total_flops(), sum(x.numel() * x.itemsize for x in tensors)


def own_rates(tasks: list[Task], seconds: float, device: str) -> dict[str, dict[str, float]]:
    """Tasks a second of each method, the meta-update with Adam included, and the memory it took."""
    rows: dict[str, dict[str, float]] = {}
    for name, method in METHODS.items():
        if device == "cpu" and (method.captured or method.autocast):
            continue
        engine = Engine(MAML(model=Model(conv4()), loss=cross_entropy, inner_lr=HEADLINE.inner_lr), method, device)
        theta = engine.initial_theta().requires_grad_()
        adam = torch.optim.Adam([theta], lr=1e-3)

        def step(engine: Engine = engine, theta: torch.Tensor = theta, adam: Any = adam) -> None:
            theta.grad = engine.meta_gradients(theta.detach(), tasks).rows.mean(dim=0)
            adam.step()

        began = time.perf_counter()
        step()
        wait(device)
        first = time.perf_counter() - began
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rows[name] = {"tasks_per_s": len(tasks) * rate(step, seconds, device), "first_step_s": first}
        if device == "cuda":
            rows[name]["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return rows


def peer_rates(inputs: Path, seconds: float, device: str) -> dict[str, dict[str, float] | str]:
    """The same of every peer that is installed here."""
    rows: dict[str, dict[str, float] | str] = {}
    for script, package in PEERS.items():
        if importlib.util.find_spec(package) is None:
            rows[script] = f"{package} is not installed here"
            continue
        command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--workload", json.dumps(HEADLINE.asdict()),
                   "--tasks", str(inputs), "--device", device, "--seconds", str(seconds)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        lines = done.stdout.strip().splitlines()
        rows[script] = json.loads(lines[-1]) if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
    return rows


def long_loop(device: str, steps: int) -> dict[str, Any]:
    """One 5-way 1-shot task of a full ResNet-12 through many second-order inner steps."""
    side = 84 if device == "cuda" else 32
    labels = torch.arange(5)
    task = Task.of(torch.rand(5, 3, side, side), labels, torch.rand(25, 3, side, side), labels.repeat(5))
    channels = (64, 160, 320, 640) if device == "cuda" else (8, 8, 8, 8)
    model = Model(ResNet12([[3, side, side]], 5, channels))
    engine = Engine(
        MAML(model=model, loss=cross_entropy, inner_lr=0.01, inner_steps=steps), Method("loop", "remat"), device
    )
    began = time.perf_counter()
    losses, rows = engine.meta_gradients(engine.initial_theta(), [task])
    finite = bool(losses.isfinite().all() and rows.isfinite().all())
    return {
        "inner_steps": steps, "parameters": engine.layout.size, "seconds": round(time.perf_counter() - began, 1),
        "finite": finite, "estimated_mib": round(estimate(engine, [task]).activations / 2**20),
        "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20) if device == "cuda" else None,
    }  # fmt: skip


def conv4() -> torch.nn.Module:
    torch.manual_seed(0)
    return Conv4([[1, 28, 28]], 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu: only to try the script")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each measurement")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: torch sees no GPU on this machine")
        return
    set_up_process(1)
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(HEADLINE, Path(folder) / "tasks.npz")
        tasks = [Task.of(*(part.to(args.device) for part in task)) for task in read_tasks(str(inputs))]
        arithmetic, bandwidth = floors(args.device, args.seconds / 4)
        flops, moved = work_of_a_task([task.map(lambda x: x.cpu()) for task in tasks], conv4)
        found = {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "floor": {"tasks_per_s_by_arithmetic": arithmetic / flops, "tasks_per_s_by_bandwidth": bandwidth / moved},
            "metadist": own_rates(tasks, args.seconds, args.device),
            "peers": peer_rates(inputs, args.seconds, args.device),
            "long_loop": long_loop(args.device, 64 if args.device == "cuda" else 4),
        }
    print(table(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2))


def table(found: dict[str, Any]) -> str:
    floor = min(found["floor"].values())
    best = max(row["tasks_per_s"] for row in found["metadist"].values())
    lines = [f"{found['device']}, torch {found['torch']}", "", "| what | tasks/s | of the floor | best metadist is |",
             "|---|---|---|---|"]  # fmt: skip
    rows = {f"metadist, {name}": row for name, row in found["metadist"].items()} | found["peers"]
    for name, row in rows.items():
        if isinstance(row, str):
            lines.append(f"| {name} | {row} | | |")
        else:
            speed = row["tasks_per_s"]
            lines.append(f"| {name} | {speed:.0f} | {speed / floor:.1%} | {best / speed:.2f} times that |")
    return "\n".join([*lines, "", f"floor: {found['floor']}", f"ResNet-12: {found['long_loop']}"])


if __name__ == "__main__":
    main()
