from itertools import product

import pytest

from metadist.config import load_config
from metadist.core.messages import PHASES
from metadist.engine import Engine, Method
from metadist.learners import MAML, Reptile
from metadist.models import MLP, Model
from metadist.models.losses import cross_entropy
from metadist.run.bench import measure, methods, overrides
from metadist.run.build import Job


def engine(learner=MAML, method="vmap", **options) -> Engine:
    return Engine(learner(model=Model(MLP([[4]], 3)), loss=cross_entropy, **options), method)


def test_every_way_to_compute_a_learner_is_tried_once_its_own_first():
    own = Method("vmap", "remat", spacing=3)
    found = methods(engine(method=own, inner_steps=3), compiled=True)
    assert found[0] == own and len(found) == len(set(found)) == 7
    assert {(m.kind, m.differentiation) for m in found} == set(product(("loop", "vmap"), ("unroll", "remat")))
    assert [m.kind for m in found if m.compiled] == ["loop", "vmap"]


def test_without_second_derivatives_or_gpu_there_is_less_to_try():
    assert methods(engine(first_order=True), compiled=False) == [Method("vmap"), Method("loop")]
    assert len(methods(engine(Reptile), compiled=False)) == 2


@pytest.mark.parametrize("method", [Method("loop"), Method("vmap", "remat"), Method("loop", compiled=True)])
def test_what_it_prints_put_into_a_job_gives_that_method(method):
    job = ["data.family=digits", "model.name=mlp", "learner.inner_steps=3", *overrides(method).split()]
    assert Job(load_config([], job)).worker().engine.method == method


def test_a_small_job_is_measured():
    job = ["data.family=digits", "model.name=mlp", "task.ways=3", "meta_batch_size=8", "engine.chunk_size=4"]
    config = load_config([], [*job, "learner.first_order=true"])
    said: list[str] = []
    found = measure(config, 0.1, compiled=False, say=said.append)
    rates = [row["tasks_per_s"] for row in found["methods"]]
    assert len(rates) == 2 and rates == sorted(rates, reverse=True) and min(rates) > 1
    assert [row["overrides"] for row in found["methods"] if row["auto"]] == [
        "engine.kind=vmap engine.differentiation=unroll"
    ]
    assert all(row["activations_mib"] > 0 for row in found["methods"])
    assert tuple(found["phases_ms_per_task"]) == PHASES and found["update_ms"] > 0
    assert found["meta_batch_size"] == 8 and any("round 3 of 3" in line for line in said)
