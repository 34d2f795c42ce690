"""What `peers.py` compares: functions that take the same steps of the same schedule from the same start, each by its own kernels.

A contender turns a `Task` into a function that runs the whole solve, from points and weights to potentials (f, g) in units of the
cost C = |x − y|², with P_ij = a_i b_j exp((f_i + g_j − C_ij)/eps). Everything a solve computes from the points (norms, centring,
the dense cost) is inside. Schedules, with T the softmin of `otgen.families.sinkhorn`, start from f = g = 0:

    alternating   `iterations` times  f ← T(g), g ← T(f)
    symmetric     (f, g) ← (T(g), T(f)); `iterations` times the mean of (f, g) and (T(g), T(f)); a last full step (T(g), T(f))

GeomLoss halves the cost, so it gets eps/2 and its potentials are doubled; flash-sinkhorn gets eps and cost_scale=1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from otgen import ops
from otgen.precision import admissible

LOG2_E = 1.4426950408889634

TOLERANCE = 1e-3
"""The marginal error for which otgen's admissible precision modes are taken."""

CPU_BYTES = 2 << 30
"""Memory a dense solve may take on the CPU."""

SCHEDULES = ("alternating", "symmetric")


class Unfit(Exception):
    """Why a contender cannot take a task."""


@dataclass(frozen=True, eq=False)
class Task:
    """x (n, d), y (m, d), weights a (n,), b (m,) of mass one, on one device and of one dtype; how many steps of what."""

    x: Tensor
    y: Tensor
    a: Tensor
    b: Tensor
    eps: float
    schedule: str
    iterations: int

    @classmethod
    def uniform(cls, n: int, d: int, schedule: str, iterations: int, device: str, share: float = 0.05) -> Task:
        """Two cubes a tenth of a side apart, n points and uniform weights each; eps is `share` of the mean cost."""
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(n, d, generator=generator) - 0.5
        y = torch.rand(n, d, generator=generator) - 0.4
        mean_cost = float(x.square().sum(1).mean() + y.square().sum(1).mean() - 2.0 * x.mean(0) @ y.mean(0))
        weights = torch.full((n,), 1.0 / n, device=device)
        return cls(x.to(device), y.to(device), weights, weights.clone(), share * mean_cost, schedule, iterations)

    @property
    def steps(self) -> int:
        """Updates of the pair of potentials."""
        return self.iterations + 2 * (self.schedule == "symmetric")

    def double(self) -> Task:
        return replace(self, x=self.x.double(), y=self.y.double(), a=self.a.double(), b=self.b.double())


@dataclass(frozen=True)
class Contender:
    """`run` computes the potentials; `precision` says how coordinates are multiplied, `source` what chose the kernel."""

    run: Callable[[], tuple[Tensor, Tensor]]
    precision: str
    source: str = ""


def otgen(task: Task, modes: tuple[str, ...] | None = None) -> Contender:
    """otgen's dispatched kernels on a GPU, streamed PyTorch on a CPU. No `modes`: those whose floor allows TOLERANCE."""
    x, y, a, b = task.x, task.y, task.a, task.b
    kappa = LOG2_E / task.eps
    scale = 2.0 * kappa
    shift = (x.sum(0) + y.sum(0)) / (len(x) + len(y))
    radius = float(max((x - shift).norm(dim=1).max(), (y - shift).norm(dim=1).max()))
    modes = modes or admissible(radius, task.eps, TOLERANCE)
    flags = ops.ALTERNATING if task.schedule == "alternating" else ops.SYMMETRIC
    choice = ops.kernel("sinkhorn", x, y, flags, modes).choice

    def run() -> tuple[Tensor, Tensor]:
        shift = (x.sum(0) + y.sum(0)) / (len(x) + len(y))
        p, q = x - shift, y - shift
        p_sq, q_sq = p.square().sum(1), q.square().sum(1)
        u, v = -kappa * p_sq, -kappa * q_sq
        if task.schedule == "alternating":
            for _ in range(task.iterations):
                u, _ = ops.sinkhorn_half_step(p, q, u, v, b, p_sq, scale=scale, modes=modes)
                v, _ = ops.sinkhorn_half_step(q, p, v, u, a, q_sq, scale=scale, modes=modes)
        else:
            for step in (1.0, *[0.5] * task.iterations, 1.0):
                u, v, _, _ = ops.sinkhorn_symmetric_step(p, q, u, v, a, b, p_sq, q_sq, scale=scale, step=step, modes=modes)
        return u / kappa + p_sq, v / kappa + q_sq

    if choice is None:
        return Contender(run, "fp32", "streamed PyTorch")
    return Contender(run, choice.precision, f"{choice.cache}: {choice.variant.text}")


def flash(task: Task, *, autotune: bool, tf32: bool = True, fused: bool | None = None) -> Contender:
    """flash-sinkhorn's solver loops, below its loss module, so that no checks of that are timed."""
    try:
        from flash_sinkhorn import sinkhorn_solvers
    except ImportError as error:
        raise Unfit(f"flash-sinkhorn cannot be imported ({error})") from error
    options = {"n_iters": task.iterations, "eps": task.eps, "cost_scale": 1.0, "allow_tf32": tf32, "autotune": autotune}
    if task.schedule == "alternating":
        solve = partial(sinkhorn_solvers.sinkhorn_flashstyle_alternating, **options)
    else:
        solve = partial(sinkhorn_solvers.sinkhorn_flashstyle_symmetric, **options, use_epsilon_scaling=False, fused=fused)
    return Contender(
        partial(solve, task.x, task.y, task.a, task.b), "tf32" if tf32 else "ieee", "autotuned" if autotune else "default"
    )


def dense(task: Task) -> Contender:
    """The formulas as they stand, on an n × m matrix, in the task's dtype."""
    _check_memory(task, matrices=5)
    x, y, eps, log_a, log_b = task.x, task.y, task.eps, task.a.log(), task.b.log()

    def run() -> tuple[Tensor, Tensor]:
        scores = torch.cdist(x, y).square_().div_(-eps)
        f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)

        def rows(g: Tensor) -> Tensor:
            return -eps * torch.logsumexp(scores + (g / eps + log_b), 1)

        def columns(f: Tensor) -> Tensor:
            return -eps * torch.logsumexp(scores + (f / eps + log_a)[:, None], 0)

        if task.schedule == "alternating":
            for _ in range(task.iterations):
                f = rows(g)
                g = columns(f)
            return f, g
        for step in (1.0, *[0.5] * task.iterations, 1.0):
            f, g = f + step * (rows(g) - f), g + step * (columns(f) - g)
        return f, g

    return Contender(run, {torch.float32: "ieee", torch.float64: "fp64"}[x.dtype])


def geomloss(task: Task, *, online: bool) -> Contender:
    """GeomLoss's own loop: its KeOps softmin (online) or its dense one (tensorized). It knows the symmetric schedule only."""
    if task.schedule != "symmetric":
        raise Unfit("GeomLoss has no alternating schedule")
    try:
        from geomloss._legacy import sinkhorn_samples as samples
    except ImportError as error:
        raise Unfit(f"GeomLoss 0.3 cannot be imported ({error})") from error
    if online and not samples.keops_available:
        raise Unfit("pykeops is not installed or does not work here")
    if not online:
        _check_memory(task, matrices=6)
    x, y, schedule = task.x, task.y, [task.eps / 2.0] * task.iterations
    weights = samples.log_weights(task.a[None]), samples.log_weights(task.b[None])

    def run() -> tuple[Tensor, Tensor]:
        if online:
            convolution = samples.lse_genred(samples.cost_formulas[2], x.shape[1])
            softmin, costs = partial(samples.softmin_online, log_conv=convolution), ((x, y), (y, x))
        else:
            softmin, costs = (
                samples.softmin_tensorized,
                (samples.cost_routines[2](x[None], y[None]), samples.cost_routines[2](y[None], x[None])),
            )
        with torch.no_grad():
            _, _, g, f = samples.sinkhorn_loop(softmin, *weights, None, None, *costs, schedule, None, debias=False)
        return 2.0 * f[0], 2.0 * g[0]

    return Contender(run, "ieee", "KeOps" if online else "dense")


def _check_memory(task: Task, matrices: int) -> None:
    need = matrices * len(task.x) * len(task.y) * task.x.element_size()
    free = CPU_BYTES
    if task.x.is_cuda:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
    if need > free:
        raise Unfit(f"{matrices} dense matrices take {need / 1e9:.0f} GB; {free / 1e9:.0f} GB are free")


CONTENDERS: dict[str, dict[str, Callable[[Task], Contender]]] = {
    "cuda": {
        "otgen tf32": partial(otgen, modes=("tf32",)),
        "otgen": otgen,
        "flash autotuned": partial(flash, autotune=True),
        "flash": partial(flash, autotune=False),
        "flash fp32": partial(flash, autotune=False, tf32=False),
        "geomloss online": partial(geomloss, online=True),
        "dense torch": dense,
    },
    "cpu": {"otgen": otgen, "geomloss tensorized": partial(geomloss, online=False), "dense torch": dense},
}
"""Who competes on which kind of device. "otgen" takes its fastest precision that is admissible for TOLERANCE."""
