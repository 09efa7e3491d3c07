import numpy as np
import torch

from metadist.models.noise import normal, uniform, words

M = (1 << 64) - 1


def splitmix(seed: int, count: int) -> list[int]:
    """The reference in integers of Python."""
    found = []
    for n in range(1, count + 1):
        z = ((n + scramble(seed)) * 0x9E3779B97F4A7C15) & M
        found.append(scramble(z))
    return found


def scramble(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M
    return z ^ (z >> 31)


def test_words_are_the_published_mixing_of_a_counter():
    for key in (0, 1, 12345, (1 << 63) - 1):
        found = [word & M for word in words(torch.tensor(key), 50).tolist()]
        assert found == splitmix(key, 50)


def test_uniform_numbers_are_uniform():
    drawn = uniform(torch.tensor(3), (100, 1000)).numpy().reshape(-1)
    assert drawn.dtype == np.float64
    assert len(np.unique(drawn)) == len(drawn)  # in float32 some would be equal, and some be 1
    counts = np.histogram(drawn, bins=20, range=(0, 1))[0]
    assert drawn.min() >= 0 and drawn.max() < 1
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi square of 19 degrees, 0.1 %


def test_normal_numbers_are_normal_and_keys_independent():
    a, b = (normal(torch.tensor(key), (200_000,)) for key in (5, 6))
    assert abs(float(a.mean())) < 0.01 and abs(float(a.var()) - 1) < 0.02
    assert abs(float((a**4).mean()) - 3) < 0.1
    assert abs(float((a * b).mean())) < 0.01


def test_it_is_the_same_under_vmap():
    keys = torch.tensor([1, 2, 9])
    assert torch.equal(
        torch.func.vmap(lambda key: uniform(key, (4, 5)))(keys), torch.stack([uniform(k, (4, 5)) for k in keys])
    )
