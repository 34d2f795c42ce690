"""What `sizes.py` asks otgen and flash-sinkhorn 0.4.1: the same problem, in the same units, with as many steps or to one tolerance.

Each class poses one kind of question. `contenders` maps names to functions that make a `Ready`: what is timed, and what a row says
of its answer. `reference()` is the answer in float64, by streamed PyTorch: on the CPU up to EXACT points, above on the device.
flash-sinkhorn is called as its users call it, autotuned, with TF32 where that is its default.

*Units.* flash-sinkhorn's `half_cost=True` is the cost ½|x − y|² of `otgen.SamplesLoss`, with eps = blur². `otgen.solve_sample` has
|x − y|² and reg = 2·blur²: the same plan, and potentials twice those of the half cost. flash-sinkhorn's product is asked with
`cost_scale=1`, and potentials that hold the weights (f + reg·log a).

*Work.* A `loss` is the debiased value under the schedule that both make of the same blur and scaling. `symmetric` and `alternating`
are ITERATIONS updates at one eps, none stopping early: `threshold` is left out there, and here an answer of fewer is a failure.
The problems of a `batch` have one diameter, which both are given, so that all take the same schedule; flash-sinkhorn's batched call
loops in Python, and `flash loop` is the same loop around its calls.

`listed` stops by each one's own estimate of the same tolerance: otgen by the errors of both marginals together, flash-sinkhorn's
multiscale backend by the larger one, estimated from samples. That solves for points rounded to TF32: `error` is for the points
given, `error_rounded` for those it was solved for.

`hvp` is one product with the same potentials, by conjugate gradients to one relative residual, or with as many steps as otgen took
(`flash equal steps`). The absolute tolerance that flash-sinkhorn adds is set to zero; `flash dense` holds the whole plan, which it
advises up to DENSE pairs. Its `sweeps` are its launches over all pairs, counted: no more than its sweeps.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
from contenders import Task, Unfit
from torch import Tensor

import otgen
from otgen.solvers.schedule import diameter

EXACT = 4000
ITERATIONS = 100
SHARE = 0.01
"""eps of the losses over the mean cost: in three dimensions a blur of about .05, GeomLoss's default."""

UNTIL = 1e-5
"""The tolerance that an alternating solve is given, and must not reach within ITERATIONS."""

TOL = 5e-3
"""flash-sinkhorn's default marginal error of its multiscale backend."""

SAMPLED = 1024
HVP_SHARE, HVP_SOLVED, HVP_TOL = 0.02, 1e-5, 1e-5
"""reg over the mean cost, marginal error of the potentials, and relative residual of the linear system."""

DENSE = 1 << 26
PLAN_SIZED = "apply_plan_vec_flashstyle", "apply_plan_mat_flashstyle", "mat5_sqeuclid"

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """`batch` problems of n points a side in d dimensions."""

    kind: str
    n: int
    d: int
    batch: int = 1

    def at_most(self, largest: int) -> Question:
        return replace(self, n=min(self.n, largest), batch=min(self.batch, largest))

    def __str__(self) -> str:
        return f"{self.kind} {f'{self.batch}×' * (self.batch > 1)}{self.n} d={self.d}"


@dataclass(frozen=True)
class Ready:
    """`run` answers; `judged(answer, reference)` is what a row says of it."""

    run: Callable[[], Any]
    judged: Callable[[Any, Any], Row]


def flash(x: Tensor, module: str = "") -> Any:
    """flash-sinkhorn, for points that it takes."""
    if not x.is_cuda:
        raise Unfit("flash-sinkhorn takes CUDA tensors only")
    try:
        return importlib.import_module("flash_sinkhorn" + module)
    except ImportError as error:
        raise Unfit(f"flash-sinkhorn cannot be imported ({error})") from error


def exactly(x: Tensor) -> Tensor:
    return x.double().cpu() if x.shape[-2] <= EXACT else x.double()


class Losses:
    """Values of SamplesLoss. `error`: largest difference from float64, over the mean size of the values."""

    error = "relative error of the value"

    def __init__(self, question: Question, device: str) -> None:
        count, n, d = question.batch, question.n, question.d
        task = Task.uniform(count * n, d, "symmetric", ITERATIONS, device, SHARE)
        self.question, self.eps = question, task.eps / 2.0
        shape = (n, d) if question.kind != "batch" else (count, n, d)
        self.x, self.y = task.x.view(shape), task.y.view(shape)

    @cached_property
    def _options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """otgen's and flash-sinkhorn's."""
        scheduled, fixed = {"blur": self.eps**0.5, "debias": True}, {"eps": self.eps, "debias": False}
        steps = {"use_epsilon_scaling": False, "n_iters": ITERATIONS}
        if self.question.kind == "batch":
            scheduled["diameter"] = diameter(self.x, self.y)
        ours, theirs = {
            "symmetric": (fixed | steps, fixed | steps),
            "alternating": (
                fixed | {"method": "alternating", "max_iter": ITERATIONS, "tol": UNTIL},
                fixed | steps | {"backend": "alternating"},
            ),
        }.get(self.question.kind, (scheduled, scheduled))
        return ours, theirs | {"half_cost": True}

    @property
    def contenders(self) -> dict[str, Callable[[], Ready]]:
        loop = {"flash loop": partial(self._flash, loop=True)} if self.question.kind == "batch" else {}
        return {"otgen": self._otgen, "flash": self._flash, **loop}

    def reference(self) -> Tensor:
        loss: Tensor = otgen.SamplesLoss(**self._options[0])(exactly(self.x), exactly(self.y))
        return loss.cpu()

    def _otgen(self) -> Ready:
        loss = otgen.SamplesLoss(**self._options[0])

        def judged(value: Tensor, exact: Tensor) -> Row:
            result = loss.last_result
            done = result.n_iters if self.question.kind == "alternating" else ITERATIONS
            if done != ITERATIONS:
                raise RuntimeError(f"stopped after {done} of {ITERATIONS} iterations")
            return self._judged(value, exact) | {"precision": result.precision}

        return Ready(lambda: loss(self.x, self.y), judged)

    def _flash(self, loop: bool = False) -> Ready:
        loss = flash(self.x).SamplesLoss(**self._options[1])
        looped = lambda: torch.stack([loss(x, y) for x, y in zip(self.x, self.y)])  # noqa: E731
        return Ready(
            looped if loop else lambda: loss(self.x, self.y), lambda *answer: self._judged(*answer) | {"precision": "tf32"}
        )

    def _judged(self, value: Tensor, exact: Tensor) -> Row:
        return {"error": float((value.double().cpu() - exact).abs().max() / exact.abs().mean())}


class Listed:
    """Clouds uniform in the unit cube, blur n^(−1/d). `error`: Σ|P·1 − a| + Σ|Pᵀ·1 − b|, by SAMPLED rows of each in float64."""

    error = "marginal error"

    def __init__(self, question: Question, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.rand(question.n, question.d, generator=generator).to(device) for _ in range(2))
        self.blur = question.n ** (-1.0 / question.d)
        self.eps = 2.0 * self.blur**2

    @property
    def contenders(self) -> dict[str, Callable[[], Ready]]:
        return {"otgen": self._otgen, "flash multiscale": self._flash}

    def reference(self) -> None:
        return None

    def marginals(self, x: Tensor, y: Tensor, f: Tensor, g: Tensor) -> Row:
        """Mean |row sum over weight − 1| of both sides, estimated, and their sum."""
        rows, columns = (self._side(*sides) for sides in ((x, y, f, g), (y, x, g, f)))
        return {"error": rows + columns, "error_rows": rows, "error_columns": columns}

    def _side(self, x: Tensor, y: Tensor, f: Tensor, g: Tensor) -> float:
        sample = torch.arange(0, len(x), -(-len(x) // SAMPLED), device=x.device)
        y, g = y.double(), g.double()
        sums = [torch.exp((f[i] + g - (x[i].double() - y).square().sum(1)) / self.eps).mean() for i in sample]
        return float((torch.stack(sums) - 1.0).abs().mean())

    def _otgen(self) -> Ready:
        def judged(result: Any, _: None) -> Row:
            told = {name: getattr(result, name) for name in ("stop", "n_iters", "passes", "visited", "omitted_mass", "precision")}
            said = {"told": result.marginal_error, "seconds_told": result.seconds}
            return self.marginals(self.x, self.y, result.potential_a, result.potential_b) | told | said

        return Ready(lambda: otgen.solve_sample(self.x, self.y, blur=self.blur, tol=TOL), judged)

    def _flash(self) -> Ready:
        options = {"backend": "multiscale", "half_cost": True, "blur": self.blur, "tol": TOL, "potentials": True}
        loss = flash(self.x).SamplesLoss(**options)
        rounded = flash(self.x, ".multiscale._preprocess").preprocess_coordinates

        def judged(potentials: tuple[Tensor, Tensor], _: None) -> Row:
            f, g = (2.0 * potential for potential in potentials)
            info, weights = loss.last_multiscale_info, torch.full_like(self.x[:, 0], 1.0 / len(self.x))
            solved = self.marginals(*rounded(self.x, self.y, weights, weights), f, g)["error"]
            said = {
                "accepted": bool(info.accepted),
                "stop": info.stop,
                "updates": info.fine_updates,
                "pairs": float(info.fine_work),
            }
            return self.marginals(self.x, self.y, f, g) | {"error_rounded": solved, "precision": "tf32"} | said

        return Ready(lambda: loss(self.x, self.y), judged)


class Product:
    """The Hessian of the transport cost in x times a direction. `error`: |difference from float64| over |the product|."""

    error = "relative error of the product"

    def __init__(self, question: Question, device: str) -> None:
        self.task = Task.uniform(question.n, question.d, "alternating", 0, device, HVP_SHARE)
        self.eps = self.task.eps
        self.v = torch.randn(question.n, question.d, generator=torch.Generator().manual_seed(1)).to(device)

    @property
    def contenders(self) -> dict[str, Callable[[], Ready]]:
        names: dict[str, dict[str, Any]] = {"flash": {}, "flash equal steps": {"steps": True}, "flash tf32": {"allow_tf32": True}}
        dense = {"flash dense": {"use_dense_cg": True}} if len(self.v) ** 2 <= DENSE else {}
        return {"otgen": self._otgen} | {name: partial(self._flash, **options) for name, options in (names | dense).items()}

    def reference(self) -> Tensor:
        x, y, v = map(exactly, (self.task.x, self.task.y, self.v))
        found: Tensor = otgen.solve_sample(x, y, reg=self.eps, tol=1e-9, max_iter=10_000).hvp(v)
        return found

    @cached_property
    def _solved(self) -> Any:
        return otgen.solve_sample(self.task.x, self.task.y, reg=self.eps, tol=HVP_SOLVED)

    @cached_property
    def _steps(self) -> int:
        return int(self._solved.hvp(self.v, tol=HVP_TOL, log=True)[1]["iterations"])

    def _judged(self, product: Tensor, exact: Tensor) -> Row:
        exact = exact.to(product.device)
        return {"error": float((product.double() - exact).norm() / exact.norm()), "marginal_error": self._solved.marginal_error}

    def _otgen(self) -> Ready:
        def judged(answer: tuple[Tensor, dict[str, Any]], exact: Tensor) -> Row:
            product, log = answer
            said = {"cg_steps": int(log["iterations"]), "sweeps": int(log["passes"]), "residual": float(log["residual"])}
            return self._judged(product, exact) | said | {"precision_of_solve": self._solved.precision}

        solved = self._solved
        return Ready(lambda: solved.hvp(self.v, tol=HVP_TOL, log=True), judged)

    def _flash(self, steps: bool = False, **options: Any) -> Ready:
        module = flash(self.v, ".hvp")
        stop = {"cg_rtol": 0.0, "max_cg_iter": self._steps} if steps else {"cg_rtol": HVP_TOL}
        f, g = (potential.float().contiguous() for potential in (self._solved.f, self._solved.g))
        options = {"eps": self.eps, "cost_scale": 1.0, "cg_atol": 0.0} | stop | options

        def run() -> Any:
            return module.hvp_x_sqeuclid_from_potentials(self.task.x, self.task.y, f, g, self.v, **options)

        def judged(answer: tuple[Tensor, Any], exact: Tensor) -> Row:
            product, info = answer
            said = {"cg_steps": info.cg_iters, "converged": info.cg_converged, "sweeps": self._launches(module, run)}
            said["residual"] = info.cg_residual / max(info.cg_initial_residual, 1e-38)
            return self._judged(product, exact) | said | {"precision": "tf32" if options.get("allow_tf32") else "ieee"}

        return Ready(run, judged)

    @staticmethod
    def _launches(module: Any, run: Callable[[], Any]) -> int:
        """Calls of what sweeps over all pairs, in one more product."""
        counted = {name: mock.Mock(wraps=getattr(module, name)) for name in PLAN_SIZED}
        with mock.patch.multiple(module, **counted):
            run()
        return sum(each.call_count for each in counted.values())


Posed = Losses | Listed | Product

KINDS: dict[str, type[Losses] | type[Listed] | type[Product]] = {
    **dict.fromkeys(("loss", "symmetric", "alternating", "batch"), Losses),
    "listed": Listed,
    "hvp": Product,
}
