"""Molecules for few-shot regression: how strongly molecules bind to a protein, a protein (ChEMBL target) a task.

    python -m tests.examples.chembl chembl_5thresh.csv.gz chembl.parquet

makes a table of the file `chembl_5thresh.csv.gz` of DeepChem (ChEMBL 22.1: a row for each molecule as SMILES, a column
for each target), which `metadist data table` imports: a row for each value that was measured, with the molecule's
hashed n-grams and, where rdkit is installed (`pip install 'metadist[chem]'`), its Morgan fingerprint and descriptors.
"""

import csv
import gzip
import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from torch import Tensor

LEVEL = 6.5  # values count from here: about the middle of ChEMBL's, -log10 of 0.3 micromolar
NGRAM_BINS, LONGEST = 1024, 4
BITS, RADIUS = 2048, 2


def ngrams(smiles: str) -> np.ndarray:
    """How often a SMILES has each run of 1 to 4 characters, in bins by CRC-32, uint8 [1024]; at most 255."""
    bins = np.zeros(NGRAM_BINS, np.int64)
    for length in range(1, LONGEST + 1):
        for start in range(len(smiles) - length + 1):
            bins[zlib.crc32(smiles[start : start + length].encode()) % NGRAM_BINS] += 1
    return np.minimum(bins, 255).astype(np.uint8)


def morgan(smiles: str) -> np.ndarray:
    """Morgan fingerprint of radius 2 (Rogers and Hahn 2010, ECFP4): 0 or 1, uint8 [2048]. Raises ValueError where rdkit
    cannot read the molecule."""
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator

    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"rdkit cannot read the molecule {smiles!r}: remove its row")
    return rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS).GetFingerprintAsNumPy(molecule)


def descriptors(smiles: str) -> np.ndarray:
    """What a chemist sees at a glance, each above its mean in about its deviation, at most 4 of these, float32 [9]:
    weight, logP, polar surface, donors and acceptors of hydrogen bonds, rotatable bonds, rings, aromatic rings, share
    of sp3 carbons."""
    from rdkit import Chem
    from rdkit.Chem import Crippen, rdMolDescriptors

    molecule = Chem.MolFromSmiles(smiles)
    found = [
        (rdMolDescriptors.CalcExactMolWt(molecule) - 430) / 110,
        (Crippen.MolLogP(molecule) - 3.8) / 1.8,
        (rdMolDescriptors.CalcTPSA(molecule) - 84) / 37,
        (rdMolDescriptors.CalcNumHBD(molecule) - 2) / 1.5,
        (rdMolDescriptors.CalcNumHBA(molecule) - 5.5) / 2.2,
        (rdMolDescriptors.CalcNumRotatableBonds(molecule) - 6) / 3.5,
        (rdMolDescriptors.CalcNumRings(molecule) - 3.8) / 1.2,
        (rdMolDescriptors.CalcNumAromaticRings(molecule) - 2.6) / 1.2,
        (rdMolDescriptors.CalcFractionCSP3(molecule) - 0.35) / 0.2,
    ]
    return np.clip(found, -4, 4).astype(np.float32)


def values(source: Path) -> pa.Table:
    """A row for each value that was measured: `target`, `molecule` (SMILES), `value` (-log10 of a concentration, above
    6.5)."""
    targets, molecules, found = [], [], []
    with gzip.open(source, "rt") as file:
        rows = csv.reader(file)
        names = next(rows)[1:]
        for smiles, *cells in rows:
            for target, cell in zip(names, cells, strict=True):
                if cell:
                    targets.append(target)
                    molecules.append(smiles)
                    found.append(float(cell) - LEVEL)
    return pa.table({"target": targets, "molecule": molecules, "value": pa.array(found, pa.float32())})


def table(source: Path) -> pa.Table:
    """The `values`, with columns of lists beside them: `ngrams`, and, where rdkit is installed, `morgan` and
    `descriptors`."""
    rows = values(source)
    features = {"ngrams": ngrams}
    if importlib.util.find_spec("rdkit"):
        features |= {"morgan": morgan, "descriptors": descriptors}
    for name, function in features.items():
        rows = rows.append_column(name, _lists(rows["molecule"].to_pylist(), function))
    return rows


def mse(outputs: Tensor, values: Tensor) -> Tensor:
    """Mean squared error, in squared units of log10; [n, 1], [n] or [n, 1] -> []."""
    return (outputs[:, 0] - values.reshape(-1)).square().mean()


def r2(outputs: Tensor, values: Tensor) -> Tensor:
    """Squared correlation of predictions and values; 0 where either are all equal."""
    predicted, measured = (x - x.mean() for x in (outputs[:, 0], values.reshape(-1)))
    both = predicted.square().sum() * measured.square().sum()
    return (predicted * measured).sum().square() / both.clamp(min=1e-12)


def _lists(molecules: list[str], features: Callable[[str], np.ndarray]) -> pa.Array:
    """The features of each row's molecule, worked out once for each molecule."""
    distinct, place = np.unique(molecules, return_inverse=True)
    rows = np.stack([features(smiles) for smiles in distinct.tolist()])[place]
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


if __name__ == "__main__":
    pyarrow.parquet.write_table(table(Path(sys.argv[1])), sys.argv[2])
