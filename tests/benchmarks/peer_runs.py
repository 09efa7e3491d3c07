"""Running one contender in a process of its own, and putting Omniglot where each reads it."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from peer_environments import last_line

OWN_VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "",  # all of this is measured on the CPU
    "PYTHONWARNINGS": "ignore",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Runner:
    """Runs scripts, with `seconds` of measurement each; one that takes longer than `limit_s` in all is ended."""

    def __init__(
        self, folder: Path, scripts: Path, interpreters: dict[str | None, Path | str], seconds: float, limit_s: float
    ):
        self.folder = folder
        self.seconds = seconds
        self._scripts = scripts
        self._interpreters = interpreters
        self._limit_s = limit_s

    def run(self, contender: Any, workload: Any, threads: int, *more: str) -> dict[str, Any]:
        """What the script printed, or {"error": why there is nothing}."""
        python = self._interpreters[contender.environment]
        if isinstance(python, str):
            return {"threads": threads, "error": python}
        command = [str(python), *contender.launcher, contender.script, "--workload", json.dumps(workload.asdict())]
        command += ["--threads", str(threads), "--seconds", str(self.seconds), *more]
        for setting in contender.settings:
            command += ["--override", setting]
        return {"threads": threads, **self._finish(command, threads)}

    def _finish(self, command: list[str], threads: int) -> dict[str, Any]:
        environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
        environment |= {**OWN_VARIABLES, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            [*command, "--started", str(time.time())],
            cwd=self._scripts,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            told, complaint = process.communicate(timeout=self._limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"error": f"not done after {self._limit_s:g} s"}
        if process.returncode:
            return {"error": last_line(complaint)}
        return json.loads(told.strip().splitlines()[-1])


def omniglot_for_learn2learn(zips: Path, root: Path) -> Path:
    """The images, where torchvision's Omniglot would have put them after downloading."""
    folder = root / "omniglot-py"
    for name in ("images_background", "images_evaluation"):
        if not (folder / name).exists():
            with zipfile.ZipFile(zips / f"{name}.zip") as packed:
                packed.extractall(folder)
    return root


def omniglot_for_metadist(zips: Path, root: Path) -> Path:
    """Omniglot imported as `metadist data omniglot` does, training characters turned as learn2learn turns them."""
    if not root.exists():
        command = [sys.executable, "-m", "metadist", "data", "omniglot", "--rotations", "train"]
        subprocess.run([*command, "--source", str(zips), "--out", str(root)], check=True, stdout=sys.stderr)
    return root
