"""A random problem for tests of the solver, and what a plan of it costs."""

from __future__ import annotations

import math

import torch

METHODS = ["alternating", "symmetric"]

LABEL_COST = torch.tensor([[0.0, 0.3, 0.5], [0.3, 0.0, 0.2], [0.5, 0.2, 0.1]], dtype=torch.float64)
"""What transport between each two of three classes costs more."""


def normal(*shape, seed=0, dtype=torch.float64):
    """A direction, or cotangent."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(n=60, m=45, d=3, seed=0, dtype=torch.float64):
    """Two overlapping clouds with random weights of mass one."""
    generator = torch.Generator().manual_seed(seed)
    x, y, a, b = (torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (m, d), (n,), (m,)))
    return x.to(dtype), (y + 0.2).to(dtype), (a / a.sum()).to(dtype), (b / b.sum()).to(dtype)


def cost(x, y):
    return torch.cdist(x, y).square()


def primal(plan, a, b, c, reg):
    product = a[:, None] * b
    entropy = torch.where(plan > 0, plan * (plan / product).log(), 0.0).sum() - plan.sum() + product.sum()
    return (plan * c).sum() + reg * entropy


SCHEDULE = 2000
"""Iterations of GeomLoss at the final regularisation, where its own schedule would still lag behind by 1/iterations."""


def uneven(n=60, m=45, d=3, seed=0, dtype=torch.float64):
    """The clouds of `problem`, of masses 1.7 and 0.6."""
    x, y, a, b = problem(n, m, d, seed, dtype)
    return x, y, 1.7 * a, 0.6 * b


def strengths(unbalanced):
    """(ρ_a, ρ_b) of what a caller passes; infinite for None."""
    pair = unbalanced if isinstance(unbalanced, tuple) else (unbalanced, unbalanced)
    return tuple(math.inf if rho is None else rho for rho in pair)


def kl(p, q):
    """KL(p | q) of measures whose masses may differ."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum() - p.sum() + q.sum()


def relaxed_primal(plan, a, b, c, reg, unbalanced):
    """`primal` and the price of the marginals that are missed; those that must fit are taken to."""
    prices = [
        rho * kl(marginal, weights)
        for rho, marginal, weights in zip(strengths(unbalanced), (plan.sum(1), plan.sum(0)), (a, b))
        if rho < math.inf
    ]
    return primal(plan, a, b, c, reg) + sum(prices)


def geomloss_without_annealing(monkeypatch):
    """Both of GeomLoss's solvers stay at the final regularisation for SCHEDULE iterations, so that they converge."""
    from geomloss._legacy import sinkhorn_samples
    from geomloss.ot._implementations import sample

    def parameters(*args, **options):
        found = scheduled(*args, **options)
        eps, rho = found.eps_list[-1], found.rho_list[-1]
        return found._replace(eps_list=[eps] * SCHEDULE, rho_list=[rho] * SCHEDULE, scale_list=[0] * SCHEDULE)

    def legacy_parameters(*args):
        diameter, eps, _, rho = legacy_scheduled(*args)
        return diameter, eps, [eps] * SCHEDULE, rho

    scheduled, legacy_scheduled = sample.annealing_parameters, sinkhorn_samples.scaling_parameters
    monkeypatch.setattr(sample, "annealing_parameters", parameters)
    monkeypatch.setattr(sinkhorn_samples, "scaling_parameters", legacy_parameters)


def cubes(n, d, seed=0, dtype=torch.float32):
    """Uniform in the unit cube, and in a shifted smaller one."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), (0.8 * y + 0.3).to(dtype)


def gaussians(n, d, seed=0, dtype=torch.float32):
    """Of unit variance, 1.2 apart in each coordinate: at that distance plain alternation takes what MATH.md says it does."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), (y + 1.2).to(dtype)


def clusters(n, m, d, seed=0, dtype=torch.float32):
    """Three tight groups: their masses differ between the clouds, and flow between groups only slowly."""
    generator = torch.Generator().manual_seed(seed)
    points = [
        0.01 * torch.rand(size, d, generator=generator, dtype=torch.float64) + torch.randint(0, 3, (size, 1), generator=generator)
        for size in (n, m)
    ]
    return [cloud.to(dtype) for cloud in points]


def mean_cost(x, y):
    return float(torch.cdist(x.double(), y.double()).square().mean())


def reference(x, y, reg, unbalanced):
    """The primal at the plan of a hundred dense alternations in float64, no cleverness."""
    x, y = x.double(), y.double()
    c, n, m = (x[:, None] - y).square().sum(2), len(x), len(y)
    rho_a, rho_b = unbalanced if isinstance(unbalanced, tuple) else (unbalanced, unbalanced)
    damp_a, damp_b = (1.0 if rho is None else rho / (rho + reg) for rho in (rho_a, rho_b))
    g = torch.zeros(m, dtype=torch.float64)
    for _ in range(100):
        f = -damp_a * reg * (torch.logsumexp((g - c) / reg, 1) - torch.tensor(m).double().log())
        g = -damp_b * reg * (torch.logsumexp((f[:, None] - c) / reg, 0) - torch.tensor(n).double().log())
    plan = ((f[:, None] + g - c) / reg).exp() / (n * m)
    a, b = torch.full((n,), 1.0 / n, dtype=torch.float64), torch.full((m,), 1.0 / m, dtype=torch.float64)
    total = (plan * c).sum() + reg * kl(plan, a[:, None] * b)
    for rho, marginal, weights in ((rho_a, plan.sum(1), a), (rho_b, plan.sum(0), b)):
        total = total + (0.0 if rho is None else rho * kl(marginal, weights))
    return float(total)


def slope(function, inputs, index, direction):
    """The derivative of `function` along `direction` of one input, by central differences of the fourth order."""

    def at(t):
        with torch.no_grad():
            moved = [tensor + t * direction if i == index else tensor for i, tensor in enumerate(inputs)]
            return float(function(*moved).value)

    h = 2e-4
    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def measures(dtype=torch.float64, mass=1.0, batch=None, n=40, m=30):
    """(a, x, b, y), the second weight of the mass given; the problems of a batch differ in place and size."""
    parts = []
    for k in range(batch or 1):
        x, y, a, b = problem(n, m, seed=k, dtype=dtype)
        parts.append((a, (1 + k) * x, mass * b, y - k))
    return parts[0] if batch is None else tuple(torch.stack(tensors) for tensors in zip(*parts))


def batch(dtype=torch.float64):
    """Three problems of one size, the second as easy as can be."""
    x, y = (torch.stack([cloud, 0.1 * cloud, 2.0 * cloud]) for cloud in problem(dtype=dtype)[:2])
    return x, y
