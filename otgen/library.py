"""The launches of `otgen.ops`, and a whole `otgen.SamplesLoss`, as operators ``torch.ops.otgen``, for what traces PyTorch programs.

Each has a kernel, which is the function of `otgen.ops` of its name, and a fake kernel, which knows shapes and dtypes: graphs of
torch.compile and torch.export hold them as they are. `otgen.ops` calls them by itself while it is traced, and goes its own way
otherwise. Import this module to have them; importing otgen does not.

Tensors may have any strides. Arguments are those of `otgen.ops`, but that schemas know no unions: of a batch, `scales`, `dampings`,
`dampings_a` and `dampings_b` (batch, 1) replace the number of their name, and `rows`, `columns` are its extents. `apply_plan` is
differentiable in `values`. Another derivative, forward mode included, is a NotImplementedError and not a zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from otgen import ops
from otgen.errors import Unsupported
from otgen.opaque import UNCAPTURED, refuse_forward_mode, samples_loss, samples_potentials

__all__ = [
    "apply_plan",
    "apply_plan_both",
    "hvp_assemble",
    "hvp_matvec",
    "plan_gradient",
    "samples_loss",
    "samples_potentials",
    "sinkhorn_debiased_step",
    "sinkhorn_half_step",
    "sinkhorn_own_step",
    "sinkhorn_symmetric_step",
    "traced",
]

PER_PROBLEM = {"scale": "scales", "damping": "dampings", "damping_a": "dampings_a", "damping_b": "dampings_b"}
"""The argument for numbers of which every problem of a batch has its own."""

PLAN = "Tensor x, Tensor y, Tensor u, Tensor v, Tensor a, Tensor b"
BATCH = "Tensor? rows=None, Tensor? columns=None, Tensor? scales=None"

Fake = Callable[..., Any]


def _operator(name: str, schema: str, fake: Fake) -> Any:
    """The function of `otgen.ops` as ``otgen::name``, without a derivative.

    PyTorch leaves out arguments that have their default value; those of the schema are the function's own, and 1 for the scale.
    """
    function = getattr(ops, name).__wrapped__
    names = [argument.split()[-1].split("=")[0] for argument in schema[1 : schema.index(")")].split(", ")]

    def kernel(*args: Any, **given: Any) -> Any:
        refuse_forward_mode(name)
        given = {key: value for key, value in {**dict(zip(names, args)), **given}.items() if value is not None}
        tensors = {key: value.contiguous() if isinstance(value, Tensor) else value for key, value in given.items()}
        numbers = {short: tensors.pop(long) for short, long in PER_PROBLEM.items() if long in tensors}
        extents = (tensors.pop("rows"), tensors.pop("columns")) if "rows" in tensors else None
        batch = {} if extents is None else {"extents": extents}
        return function(**{"scale": 1.0, **tensors, **numbers, **batch, "modes": tuple(tensors["modes"])})

    operator = torch.library.custom_op(f"otgen::{name}", kernel, mutates_args=(), schema=schema, **UNCAPTURED)

    @operator.register_fake
    def traced(*args: Any, **given: Any) -> Any:
        refuse_forward_mode(name)
        return fake(*args, **given)

    def refuse(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise Unsupported(f"expected no derivative of otgen::{name}; got one; type .detach() on what it is given")

    operator.register_autograd(refuse)
    return operator


def _like(tensor: Tensor, shape: Any = None) -> Tensor:
    return tensor.new_empty(tensor.shape if shape is None else shape)


def _applied(x: Tensor, y: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor, values: Tensor, *rest: Any, **more: Any) -> Tensor:
    return _like(values, u.shape if values.ndim == b.ndim else (*u.shape, values.shape[-1]))


sinkhorn_half_step = _operator(
    "sinkhorn_half_step",
    "(Tensor x, Tensor y, Tensor u, Tensor v, Tensor b, Tensor x_sq, "
    f"str[] modes, float scale=1.0, float damping=1.0, float step=1.0, {BATCH}, Tensor? dampings=None) -> (Tensor, Tensor)",
    lambda x, y, u, *rest, **more: (_like(u), _like(u)),
)
sinkhorn_symmetric_step = _operator(
    "sinkhorn_symmetric_step",
    f"({PLAN}, Tensor x_sq, Tensor y_sq, str[] modes, float scale=1.0, float damping_a=1.0, float damping_b=1.0, float step=0.5, "
    f"{BATCH}, Tensor? dampings_a=None, Tensor? dampings_b=None) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, y, u, v, *rest, **more: (_like(u), _like(v), _like(u), _like(v)),
)
sinkhorn_own_step = _operator(
    "sinkhorn_own_step",
    "(Tensor x, Tensor y, Tensor u, Tensor a, Tensor x_sq, "
    f"str[] modes, float scale=1.0, float damping=1.0, float step=0.5, {BATCH}, Tensor? dampings=None) -> (Tensor, Tensor)",
    lambda x, y, u, *rest, **more: (_like(u), _like(u)),
)
sinkhorn_debiased_step = _operator(
    "sinkhorn_debiased_step",
    "(Tensor x, Tensor y, Tensor u, Tensor v, Tensor p, Tensor q, Tensor a, Tensor b, Tensor x_sq, Tensor y_sq, str[] modes, "
    f"float scale=1.0, float damping_a=1.0, float damping_b=1.0, float step=0.5, {BATCH}, Tensor? dampings_a=None, "
    "Tensor? dampings_b=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, y, u, v, *rest, **more: tuple(_like(side) for side in (u, v) * 4),
)
apply_plan = _operator("apply_plan", f"({PLAN}, Tensor values, str[] modes, float scale=1.0, {BATCH}) -> Tensor", _applied)
apply_plan_both = _operator(
    "apply_plan_both",
    f"({PLAN}, Tensor values, Tensor values_t, str[] modes, float scale=1.0, {BATCH}) -> (Tensor, Tensor)",
    lambda x, y, u, v, a, b, values, values_t, *rest, **more: (_like(values_t), _like(values)),
)
plan_gradient = _operator(
    "plan_gradient",
    f"({PLAN}, Tensor marginal, str[] modes, float scale=1.0, float cost=1.0, {BATCH}) -> Tensor",
    lambda x, y, u, *rest, **more: _like(u, x.shape),
)
hvp_matvec = _operator(
    "hvp_matvec",
    "(Tensor x, Tensor y, Tensor u, Tensor v, Tensor left, Tensor right, Tensor w, Tensor z, str[] modes, "
    "float scale, float alpha, float beta) -> Tensor",
    lambda x, y, u, *rest, **more: _like(u),
)
hvp_assemble = _operator(
    "hvp_assemble",
    f"({PLAN}, Tensor marginal, Tensor direction, Tensor w_f, Tensor w_g, str[] modes, "
    "float scale, float cost, float inverse_eps) -> Tensor",
    lambda x, y, u, v, a, b, marginal, direction, *rest, **more: _like(direction),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, u, v, a, b, _, ctx.modes, ctx.scale, rows, columns, scales = inputs
    ctx.save_for_backward(x, y, u, v, a, b, rows, columns, scales)


def _transposed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Pᵀ·grad, the derivative in `values`."""
    others = [name for name, needed in zip("xyuvab", ctx.needs_input_grad) if needed]
    others += ["scales"] if any(ctx.needs_input_grad[7:]) else []
    if others:
        raise Unsupported(
            f"expected otgen::apply_plan to be differentiated in values alone; got {', '.join(others)} with requires_grad; "
            f"type {others[0]}.detach()"
        )
    x, y, u, v, a, b, rows, columns, scales = ctx.saved_tensors
    values: Tensor = apply_plan(y, x, v, u, b, a, grad, ctx.modes, ctx.scale, columns, rows, scales)
    return *(None,) * 6, values, *(None,) * 5


apply_plan.register_autograd(_transposed, setup_context=_keep)


OPERATORS = {
    "sinkhorn_half_step": sinkhorn_half_step,
    "sinkhorn_symmetric_step": sinkhorn_symmetric_step,
    "sinkhorn_own_step": sinkhorn_own_step,
    "sinkhorn_debiased_step": sinkhorn_debiased_step,
    "apply_plan": apply_plan,
    "apply_plan_both": apply_plan_both,
    "plan_gradient": plan_gradient,
    "hvp_matvec": hvp_matvec,
    "hvp_assemble": hvp_assemble,
}


def traced(name: str, *tensors: Any, modes: tuple[str, ...] = ("ieee",), **options: Any) -> Any:
    """What the function of `otgen.ops` is in a graph: its operator, given the same arguments."""
    given: dict[str, Any] = {"modes": list(modes)}
    for key, value in options.items():
        if key == "extents":
            given["rows"], given["columns"] = (None, None) if value is None else value
        else:
            given[PER_PROBLEM[key] if isinstance(value, Tensor) else key] = value
    return OPERATORS[name](*tensors, **given)
