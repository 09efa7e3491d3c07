"""Small runs on pictures, texts and tables in files, as people have them."""

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from metadist.config import load_config
from metadist.data import importers, open_dataset
from metadist.run.api import train

WORDS = ["pay", "send", "money", "card", "open", "close", "lock", "call", "mail", "home", "work", "ask", "stop", "sing"]
NET = """
import torch


class Net(torch.nn.Module):
    \"\"\"Any number of inputs.\"\"\"

    def __init__(self, outputs: int, width: int):
        super().__init__()
        self.body, self.head = torch.nn.Linear(width, 8), torch.nn.Linear(8, outputs)

    def features(self, *inputs):
        return torch.tanh(self.body(torch.cat([x.float().reshape(len(x), -1) for x in inputs], 1)))

    def forward(self, *inputs):
        return self.head(self.features(*inputs))
"""


class RawRuns:
    """Raw files, datasets of them, and runs of two steps; each made when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._runs: dict[str, Path] = {}

    @cached_property
    def pictures(self) -> Path:
        """A folder per class: pictures of many sizes, in colours, of one class also grey ones of 16 bits."""
        rng = np.random.default_rng(0)
        for name in range(8):
            (self.folder / "birds" / f"bird{name}").mkdir(parents=True)
            for number in range(6):
                size = rng.integers(9, 20, 2)
                pixels = rng.integers(0, 255, (*size, 3)) // 2 + np.array([name * 9, 120 - name * 9, 0])
                picture = Image.fromarray(pixels.astype(np.uint8))
                if name == 7:
                    picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 16)
                picture.save(self.folder / "birds" / f"bird{name}" / f"{number}.png")
        return self.folder / "birds"

    @cached_property
    def texts(self) -> Path:
        """JSON lines of `text` and `intent`: the intent's word, and others."""
        rng = np.random.default_rng(1)
        lines = [
            json.dumps({"text": " ".join(["Please", word, *rng.choice(WORDS, 5)]), "intent": f"to {word}"})
            for word in WORDS[:8] for _ in range(6)
        ]  # fmt: skip
        (self.folder / "intents.jsonl").write_text("\n".join(lines))
        return self.folder / "intents.jsonl"

    @cached_property
    def table(self) -> Path:
        """Rows of 12 users: numbers of several types, one with gaps, lists, a class and a value."""
        rng, n = np.random.default_rng(2), 240
        user, age = np.repeat(np.arange(12), 20), rng.normal(40, 9, n).astype(np.float32)
        columns = {
            "user": user, "age": age, "income": rng.integers(900, 9000, n),
            "trips": pa.array(rng.normal(size=n), mask=np.arange(n) % 7 == 0),
            "city": rng.choice(["Oslo", "Rome", "Lima"], n),
            "face": pa.array(list(rng.normal(3, 2, (n, 3)).astype(np.float32))),
            "clicked": np.where(age + user > 45, "yes", "no"), "price": 1000 + 3 * age + user,
        }  # fmt: skip
        pq.write_table(pa.table(columns), self.folder / "visits.parquet")
        return self.folder / "visits.parquet"

    def dataset(self, name: str) -> Path:
        out = self.folder / f"data_{name}"
        if out.exists():
            return out
        if name == "pictures":
            return importers.images(self.pictures, out, size=(12, 12))
        if name == "grey":
            return importers.images(self.pictures, out, size=(8, 10), mode="gray")
        if name == "texts":
            return importers.text(self.texts, out, label="intent", length=6)
        several = ["x=age,city,income", "face", "trips"]
        inputs, targets = (["age", "income"], ["price"]) if name == "values" else (several, ["clicked"])
        return importers.table(self.table, out, group="user", inputs=inputs, targets=targets, standardize=True)

    def test_split(self, name: str):
        return open_dataset(self.dataset(name)).splits["test"]

    def run(self, name: str, learner: str = "maml", *settings: str) -> Path:
        """The run directory of a run on that dataset."""
        key = f"{name}_{learner}"
        if key not in self._runs:
            (self.folder / "raw_net.py").write_text(NET)
            sizes = [] if name == "values" else ["task.ways=2"]
            width = {"labelled": 11, "values": 2}.get(name)
            outputs = 1 if name == "values" else 2
            model = ["model.name=raw_net:Net", f"model.outputs={outputs}", f"model.width={width}"] if width else []
            job = [
                f"data.path={self.dataset(name)}", "task.shots=2", "task.queries=2", *sizes, *model, "meta_steps=2",
                f"learner.name={learner}", "meta_batch_size=2", "evaluation.test_tasks=2", "evaluation.every=0",
                "evaluation.baselines=[]", "engine.gradient_check=false", "fleet.backend=local",
                "tracking.mlflow=false", f"run_dir={self.folder / 'runs' / key}", *settings,
            ]  # fmt: skip
            train(load_config([], job), quiet=True)
            self._runs[key] = self.folder / "runs" / key
        return self._runs[key]
