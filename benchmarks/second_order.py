"""A Hessian-vector product of the transport cost on the CPU: otgen beside an unrolled solve and OTT-JAX's implicit derivative.

    python benchmarks/second_order.py [--sizes 500,2000] [--limit 300]

n = m points in d = 64, eps = .05 of the mean cost, float64, two threads, a solve to an L1 marginal error of 1e-9 first; then the
product with one random direction in x, timed without the solve where a contender can keep it:

    otgen          OTResult.hvp
    unrolled       double backward through as many dense alternating updates as reach the same error, with the solve
    OTT-JAX        jax.jvp of jax.grad of the regularised cost, compiled, with the solve. By default it takes the potentials for
                   constants in the first derivative (Danskin) and so loses their share of the second: its error is not rounding.
                   With use_danskin=False, which would have it, ott 0.6.0 fails inside lineax 0.1.1

Errors are relative to otgen's product solved to 1e-12. Writes benchmarks/results/cpu/second_order.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otgen.pool import Pool, Role

RESULT = Path(__file__).parent / "results" / "cpu" / "second_order.json"
D, SHARE, TOL = 64, 0.05, 1e-9


def problem(n: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Two Gaussian clouds, a direction in x, and eps."""
    generator = torch.Generator().manual_seed(0)
    x, y, v = (torch.randn(n, D, generator=generator, dtype=torch.float64) for _ in range(3))
    y = y + 0.1
    mean = float(x.square().sum(1).mean() + y.square().sum(1).mean() - 2.0 * x.mean(0) @ y.mean(0))
    return x, y, v, SHARE * mean


def otgen(x: Tensor, y: Tensor, v: Tensor, eps: float) -> tuple[Callable[[], Tensor], int]:
    import otgen

    result = otgen.solve_sample(x, y, reg=eps, tol=TOL, max_iter=10_000)
    return lambda: result.hvp(v), result.n_iters


def unrolled(x: Tensor, y: Tensor, v: Tensor, eps: float) -> tuple[Callable[[], Tensor], int]:
    """Dense alternating updates, recorded by autograd and differentiated twice."""
    import otgen

    updates = otgen.solve_sample(x, y, reg=eps, tol=TOL, max_iter=100_000, method="alternating").n_iters
    log_n, log_m = (torch.tensor(float(len(points)), dtype=x.dtype).log() for points in (x, y))

    def product() -> Tensor:
        points = x.clone().requires_grad_()
        costs = (points.square().sum(1)[:, None] + y.square().sum(1) - 2.0 * points @ y.T) / eps
        g = torch.zeros(len(y), dtype=x.dtype)
        for _ in range(updates):
            f = -torch.logsumexp(g - costs - log_m, 1)
            g = -torch.logsumexp(f - costs.T - log_n, 1)
        (gradient,) = torch.autograd.grad(eps * (f.mean() + g.mean()), points, create_graph=True)
        (found,) = torch.autograd.grad(gradient, points, v)
        return found

    return product, updates


def ott(x: Tensor, y: Tensor, v: Tensor, eps: float) -> tuple[Callable[[], Tensor], int]:
    import jax

    jax.config.update("jax_enable_x64", True)
    from ott.geometry import pointcloud
    from ott.solvers import linear

    arrays = [jax.numpy.asarray(tensor.numpy()) for tensor in (x, y, v)]

    def cost(points: jax.Array, others: jax.Array) -> jax.Array:
        geometry = pointcloud.PointCloud(points, others, epsilon=eps)
        return linear.solve(geometry, threshold=TOL, max_iterations=100_000).reg_ot_cost

    @jax.jit
    def product(points: jax.Array, others: jax.Array, way: jax.Array) -> jax.Array:
        return jax.jvp(lambda p: jax.grad(cost)(p, others), (points,), (way,))[1]

    product(*arrays).block_until_ready()
    return lambda: torch.from_numpy(np.array(product(*arrays))), 0


CONTENDERS = {"otgen": ("otgen", otgen), "unrolled": ("torch", unrolled), "OTT-JAX": ("ott", ott)}


def attempt(name: str, n: int) -> dict[str, float]:
    """Seconds of one product (the second of two), its error, and the updates of the solve, in a process of its own."""
    import otgen as library

    torch.set_num_threads(2)
    x, y, v, eps = problem(n)
    product, updates = CONTENDERS[name][1](x, y, v, eps)
    product()
    began = time.perf_counter()
    found = product()
    seconds = time.perf_counter() - began
    exact = library.solve_sample(x, y, reg=eps, tol=1e-12, max_iter=10_000).hvp(v, tol=1e-13)
    return {"seconds": seconds, "error": float((found - exact).norm() / exact.norm()), "updates": updates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="500,2000", help="n = m, comma-separated")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds an attempt may take")
    options = parser.parse_args()
    rows = []
    with Pool(product=Role(1, options.limit, {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": None})) as pool:
        for n in map(int, options.sizes.split(",")):
            for name, (module, _) in CONTENDERS.items():
                if importlib.util.find_spec(module):
                    pool.submit("product", None, attempt, name, n)
                    outcome = pool.next()
                    value = outcome.value if outcome.status == "ok" else {"status": outcome.message or outcome.status}
                    rows.append({"n": n, "d": D, "contender": name, **value})
                    print(rows[-1], flush=True)
    RESULT.write_text(json.dumps({"limit_s": options.limit, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
