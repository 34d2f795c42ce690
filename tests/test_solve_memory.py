"""Memory is linear in the points: a hundred thousand on each side, whose costs would take 40 GB, fit beside everything else."""

from __future__ import annotations

import json
import subprocess
import sys

LIMIT = 500e6

SWEEP = """
import json, resource, time, torch
from otgen import ops
torch.set_num_threads(1)
n, d = 100_000, 3
def cloud(size):
    x = torch.rand(size, d)
    return x, x.square().sum(1), torch.zeros(size), torch.full((size,), 1 / size)
def sweep(size):
    (x, x_sq, u, a), (y, y_sq, v, b) = cloud(size), cloud(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    u, rho = ops.sinkhorn_half_step(x, y, u, v, b, x_sq, scale=2.0, modes=("ieee",))
    return before, float(u.sum()), float((a * rho).sum())
sweep(3000)
before, total, mass = sweep(n)
print(json.dumps([1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), total, mass]))
"""


def test_a_sweep_over_a_hundred_thousand_points_takes_few_megabytes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, check=True)
    above, total, mass = json.loads(done.stdout)
    assert above < LIMIT
    assert total == total
    assert mass > 1.0
