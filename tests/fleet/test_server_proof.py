"""Whether two machines would apply meta-updates alike."""

import os
import subprocess
import sys

import torch

from metadist.fleet.server import server_proof

CODE = """
import torch
from metadist.fleet.server import server_proof
theta = torch.linspace(-1, 1, 1003, requires_grad=True)
adam = torch.optim.Adam([theta], lr=0.01, foreach=False)
for step in range(3):
    adam.zero_grad()
    (theta.sin() * theta).sum().backward()
    adam.step()
import hashlib
print(server_proof(), hashlib.sha256(theta.detach().numpy().tobytes()).hexdigest())
"""


def test_it_does_not_depend_on_threads_or_the_process():
    alone = server_proof.__wrapped__()
    torch.set_num_threads(3)
    try:
        assert server_proof.__wrapped__() == alone == server_proof()
    finally:
        torch.set_num_threads(1)


def test_machines_that_step_adam_differently_have_different_proofs():
    """Two machines are imitated by the vector instructions that torch is allowed; the independent judge is Adam."""
    told = {}
    for capability in ("default", "avx2"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        told[capability] = done.stdout.split()
    (proof, adam), (other_proof, other_adam) = told.values()
    assert adam == other_adam or proof != other_proof
