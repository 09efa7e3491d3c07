import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from metadist import Engine, Examples, Model, Task, load_config, train
from metadist.data import open_dataset
from metadist.data.importers import table as import_table
from metadist.models.losses import mean_squared_error
from tests.examples import chembl
from tests.examples.molecule_baselines import fingerprint_ridge, nearest_neighbours, random_forest, tanimoto_process
from tests.examples.molecule_process import MoleculeProcess, Molecules

FILE = Path(__file__).resolve().parents[3] / "shared" / "data" / "chembl" / "chembl_5thresh.csv.gz"
BASELINES = (fingerprint_ridge, tanimoto_process, random_forest, nearest_neighbours)


def task(support: int = 6, query: int = 5, seed: int = 0) -> Task:
    """Random bits and descriptors; values are linear in both."""
    rng = np.random.default_rng(seed)
    slope, parts = rng.normal(size=12), []
    for rows in (support, query):
        bits, descriptors = rng.integers(0, 2, (rows, 9)).astype("f"), rng.normal(size=(rows, 3)).astype("f")
        values = np.concatenate([bits, descriptors], 1) @ slope
        parts.append(Examples((bits, descriptors), (values.astype("f"),)))
    return Task(*parts)


def small_learner() -> MoleculeProcess:
    return MoleculeProcess(model=Model(Molecules(descriptors=3)), loss=mean_squared_error)


def test_ngrams_are_counted_in_their_bins() -> None:
    """CRC-32 (of zlib, as in PNG) of C, O, CC, CO, CCO modulo 1024, worked out by its polynomial bit by bit."""

    def crc(text: str) -> int:
        register = 0xFFFFFFFF
        for byte in text.encode():
            register ^= byte
            for _ in range(8):
                register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
        return register ^ 0xFFFFFFFF

    expected = np.zeros(1024, np.uint8)
    for text in ("C", "C", "O", "CC", "CO", "CCO"):
        expected[crc(text) % 1024] += 1
    np.testing.assert_array_equal(chembl.ngrams("CCO"), expected)
    assert chembl.ngrams("C" * 300)[crc("C") % 1024] == 255


def test_a_fingerprint_has_a_bit_for_each_neighbourhood() -> None:
    """Ethane: two like atoms, alone and with their neighbour, which is all of the molecule. Ethanol: three atoms, each
    alone and with its neighbours, then what all see, once."""
    pytest.importorskip("rdkit")
    methane, ethane, ethanol = map(chembl.morgan, ("C", "CC", "CCO"))
    assert [each.sum() for each in (methane, ethane, ethanol)] == [1, 2, 6]
    np.testing.assert_array_equal(chembl.morgan("OCC"), ethanol)
    assert (ethanol & ethane).sum() == 1  # a methyl group, and not its bond to another
    with pytest.raises(ValueError, match="cannot read the molecule 'C1'"):
        chembl.morgan("C1")


def test_descriptors_of_ethanol() -> None:
    pytest.importorskip("rdkit")
    found = chembl.descriptors("CCO") * np.array([110, 1.8, 37, 1.5, 2.2, 3.5, 1.2, 1.2, 0.2])
    found += np.array([430, 3.8, 84, 2, 5.5, 6, 3.8, 2.6, 0.35])
    weight = 2 * 12 + 15.9949146 + 6 * 1.00782503
    np.testing.assert_allclose(found[[0, 2, 3, 4, 5]], [weight, 20.23, 1, 1, 0], atol=1e-3)
    np.testing.assert_allclose(found[[6, 7, 8]], [0, 0, 1], atol=1e-3)


def test_the_two_measures() -> None:
    outputs, values = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 3.0, 4.0])
    assert chembl.mse(outputs, values).item() == pytest.approx(1 / 3)
    correlation = np.corrcoef(outputs[:, 0], values)[0, 1]
    assert chembl.r2(outputs, values).item() == pytest.approx(correlation**2)
    assert chembl.r2(torch.ones(3, 1), values).item() == 0


def test_the_gaussian_process_of_two_molecules_in_closed_form() -> None:
    """Bits 1100 and 0110 share one of three: k = 1/3. With y = (a, -a) the constant kernel drops out, and the shares
    are a / (1 + noise - 1/3) and its negative. A query 1100 is 1 and 1/3 like them."""
    bits = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], np.float32)
    none, a = np.zeros((2, 1), np.float32), 0.7
    asked = Examples((bits[:1], none[:1]), (np.zeros(1, np.float32),))
    values = tanimoto_process(Task(Examples((bits, none), (np.array([a, -a], np.float32),)), asked))
    assert values[0, 0] == pytest.approx((1 - 1 / 3) * a / (1 + 0.02 - 1 / 3), rel=1e-6)


def test_ridge_is_that_of_the_normal_equations() -> None:
    one = task()
    x, asked = (np.concatenate([part.inputs[0], 0.5 * part.inputs[1]], 1, dtype=np.float64) for part in one)
    y = one.support.targets[0].astype(np.float64)
    slope = np.linalg.solve((x - x.mean(0)).T @ (x - x.mean(0)) + 5 * np.eye(12), (x - x.mean(0)).T @ (y - y.mean()))
    np.testing.assert_allclose(fingerprint_ridge(one)[:, 0], y.mean() + (asked - x.mean(0)) @ slope, rtol=1e-9)


def test_neighbours_are_weighted_by_similarity() -> None:
    bits = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], np.float32)
    support = Examples((bits, np.zeros((5, 1))), (np.array([1.0, 2.0, 4.0, 8.0, 16.0]),))
    query = Examples((np.array([[1, 1, 0, 0]], np.float32), np.zeros((1, 1))), (np.zeros(1),))
    similar = np.array([1, 1 / 2, 1 / 2, 0])
    expected = similar @ [1, 2, 4, 8] / similar.sum()
    assert nearest_neighbours(Task(support, query))[0, 0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("baseline", BASELINES)
def test_baselines_give_a_value_for_each_query_and_do_not_see_its_own(baseline) -> None:
    one = task()
    found = baseline(one)
    assert found.shape == (5, 1) and np.isfinite(found).all()
    blind = one._replace(query=one.query._replace(targets=(np.full(5, np.nan, np.float32),)))
    np.testing.assert_array_equal(baseline(blind), found)


def test_the_process_is_that_of_its_kernel_in_closed_form() -> None:
    one, learner = task(), small_learner()
    engine = Engine(learner, "loop", dtype=torch.float64)
    theta = engine.initial_theta() + 0.1 * torch.randn(engine.layout.size, dtype=torch.float64)
    named = {name: value.numpy() for name, value in engine.layout.unflatten(theta).items()}
    size = {name.removeprefix("variance/"): np.exp(value) for name, value in named.items() if "variance/" in name}

    def kernel(a, b):
        both = (a[0][:, None] * b[0][None]).sum(-1)
        either = np.maximum(a[0][:, None], b[0][None]).sum(-1)
        apart = (a[1][:, None] - b[1][None]) @ named["body.weight"].T
        close = size["smooth"] * np.exp(-(apart**2).sum(-1) / 2)
        return both / either + size["linear"] * both / 50 + close + size["level"]

    x, asked = ([np.asarray(field, np.float64) for field in part.inputs] for part in one)
    mean, later = (named["head.weight"] @ each[1].T + named["head.bias"] for each in (x, asked))
    shares = np.linalg.solve(kernel(x, x) + size["noise"] * np.eye(6), one.support.targets[0] - mean[0])
    expected = later[0] + kernel(asked, x) @ shares
    loss = np.square(expected - one.query.targets[0]).mean()
    assert engine.meta_gradients(theta, [one]).losses[0].item() == pytest.approx(loss, rel=1e-6)


def test_its_gradient_is_that_of_finite_differences_and_engines_agree() -> None:
    engines = [Engine(small_learner(), kind, dtype=torch.float64) for kind in ("loop", "vmap")]
    torch.manual_seed(0)
    theta = engines[0].initial_theta() + 0.1 * torch.randn(engines[0].layout.size, dtype=torch.float64)
    tasks = [task(seed=seed) for seed in range(3)]
    loop, vmap = (engine.meta_gradients(theta, tasks).rows for engine in engines)
    torch.testing.assert_close(vmap, loop, rtol=1e-9, atol=1e-12)
    step = 1e-5 * torch.randn(len(theta), dtype=torch.float64)
    up, down = (engines[0].meta_gradients(theta + sign * step, tasks).losses for sign in (1, -1))
    torch.testing.assert_close(loop @ step, (up - down) / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.wide
def test_a_job_from_the_file_of_values_to_a_verdict(tmp_path: Path) -> None:
    """A file like DeepChem's, of made-up values: table, import, training with the same bits on two workers."""
    pytest.importorskip("rdkit")
    rng = np.random.default_rng(0)
    chains = ["C" * n + end for n in range(1, 9) for end in ("O", "N", "F", "Cl", "C=O")]
    lines = ["smiles," + ",".join(f"T{n}" for n in range(9))]
    for chain in chains:
        cells = [f"{5 + 0.2 * len(chain) + rng.normal():.2f}" if rng.random() < 0.8 else "" for _ in range(9)]
        lines.append(",".join([chain, *cells]))
    with gzip.open(tmp_path / "values.csv.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    content = chembl.table(tmp_path / "values.csv.gz")
    assert content.num_rows == sum(line.count(".") for line in lines[1:])
    pyarrow.parquet.write_table(content, tmp_path / "values.parquet")
    asked: dict[str, Any] = {"group": "target", "inputs": ["morgan", "descriptors"], "targets": ["value"]}
    import_table(tmp_path / "values.parquet", tmp_path / "data", **asked, share="molecule")
    job = Path(__file__).resolve().parents[2] / "jobs" / "domains" / "chembl_16.yaml"
    small = [
        f"data.path={tmp_path / 'data'}", "task.shots=6", "task.queries=5", "meta_steps=3", "evaluation.tasks=4",
        "evaluation.test_tasks=4", "evaluation.joint_steps=2", "fleet.backend=local", "engine.chunk_size=4",
        "tracking.mlflow=false",
    ]  # fmt: skip
    names = load_config([job]).evaluation.baselines or ()
    results, others = (
        train(
            load_config(
                [job], [*small, f"num_workers={n}", f"run_dir={tmp_path / str(n)}", f"evaluation.baselines={b}"]
            ),
            quiet=True,
        )
        for n, b in ((1, names), (2, []))
    )
    assert results["theta_sha256"] == others["theta_sha256"]
    assert {name.rpartition(":")[2] for name in results["baselines"]} == {name.rpartition(":")[2] for name in names}
    assert {"mse", "r2"} <= set(results) and "no baseline" not in results["verdict"]


def test_the_real_file_is_split_without_a_shared_molecule(tmp_path: Path) -> None:
    """The counts are worked out here by sets of molecules."""
    if not FILE.is_file():
        pytest.skip(f"no ChEMBL in {FILE.parent}: put DeepChem's chembl_5thresh.csv.gz there")
    rows = chembl.values(FILE)
    numbers = dict(zip(sorted(set(rows["molecule"].to_pylist())), range(rows.num_rows), strict=False))
    rows = rows.append_column("number", pa.array([float(numbers[smiles]) for smiles in rows["molecule"].to_pylist()]))
    pyarrow.parquet.write_table(rows, tmp_path / "values.parquet")
    asked: dict[str, Any] = {"group": "target", "inputs": ["number"], "targets": ["value"]}
    usual = open_dataset(import_table(tmp_path / "values.parquet", tmp_path / "usual", **asked)).splits
    apart = open_dataset(import_table(tmp_path / "values.parquet", tmp_path / "apart", **asked, disjoint="molecule"))
    train_, validation, test = (usual[split].column("number") for split in ("train", "validation", "test"))
    assert np.isin(test, train_).mean() == pytest.approx(0.9064, abs=5e-5)
    validation_left = validation[~np.isin(validation, test)]
    train_left = train_[~np.isin(train_, test) & ~np.isin(train_, validation)]
    for split, left in (("train", train_left), ("validation", validation_left), ("test", test)):
        np.testing.assert_array_equal(np.sort(apart.splits[split].column("number")), np.sort(left))
    counts = [note["count"] for note in apart.metadata["notes"] if note["what"] == "rows left out"]
    assert counts == [len(train_) - len(train_left), len(validation) - len(validation_left)] == [41662, 9711]
