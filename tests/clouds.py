"""A random problem for tests of the solver, and what a plan of it costs."""

from __future__ import annotations

import torch

METHODS = ["alternating", "symmetric"]


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
