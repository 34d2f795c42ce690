"""Whether a rendered kernel computes its formula: outputs poisoned, compared with float64 inside a budget derived from the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from otgen.errors import OtgenError
from otgen.families import family
from otgen.families.tiles import is_packed, is_whole, torch_dtype
from otgen.problem import Problem, Spec, Variant

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One output's largest error against float64, and the largest it was allowed. NaN counts as infinite."""

    output: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget


def small(problem: Problem, variant: Variant) -> Problem:
    """An awkward problem of the same kind that is quick to interpret: a little more than two tiles, three of a batch at most.

    Two, because the first rows are redone, and a sweep that ended too soon would still have seen two tiles of fewer columns. Of a
    variant whose tile is the whole problem, a little less than one.
    """
    flags = tuple((name, min(problem.batch, 3) if name == "batch" else value) for name, value in problem.flags)
    block_m, block_n = variant.int("BLOCK_M"), variant.int("BLOCK_N")
    if is_whole(variant):
        return replace(problem, n=block_m - 3, m=block_n - (3 if problem.own else 5), flags=flags)
    return replace(problem, n=2 * block_m + 3, m=2 * block_n + 5, flags=flags)


def verify(problem: Problem, variant: Variant, launch: Callable[..., None], device: str, seed: int = 0) -> list[Accuracy]:
    """Runs `launch` on `problem`'s test input on `device` and measures every output against the float64 reference.

    Outputs are filled with NaN first, so that an element nobody wrote is an error. The budget is that of the variant's precision.
    """
    import torch

    kind = family(problem.family)
    given = kind.inputs(problem, seed)
    expected = kind.reference(problem, given)
    allowed = kind.budget(problem, variant, given, expected)
    call = call_arguments(problem, given, device)
    launch(**call)
    return [
        Accuracy(name, float(torch.nan_to_num((call[name].cpu().double() - value).abs(), nan=torch.inf).max()), allowed[name])
        for name, value in expected.items()
    ]


def call_arguments(problem: Problem, given: Mapping[str, Any], device: str) -> dict[str, Any]:
    """`launch()`'s arguments on `device` for these input values, outputs full of NaN."""
    return {name: _argument(spec, given.get(name), device) for name, spec in family(problem.family).arguments(problem).items()}


def _argument(spec: Spec | float, value: Any, device: str) -> torch.Tensor | float:
    import torch

    if not isinstance(spec, Spec):
        return type(spec)(value)
    dtype = torch_dtype(spec.dtype)
    if spec.role == "in":
        tensor: torch.Tensor = value.to(dtype).contiguous().to(device)
        return tensor
    return torch.full(spec.shape, torch.nan, dtype=dtype, device=device)


def interpret(problem: Problem, variant: Variant, seed: int = 0) -> list[Accuracy]:
    """`verify` through Triton's interpreter, on the awkward small problem. Needs TRITON_INTERPRET=1 in the environment.

    The interpreter multiplies in fp32 whatever the precision mode, so fp32's budget applies to all of them; but packed operands are
    rounded there too.
    """
    from otgen.blocks import INTERPRETED
    from otgen.render import load

    if not INTERPRETED.value:
        raise OtgenError("expected the interpreter; this process compiles; set TRITON_INTERPRET=1 before it starts")
    allowed = variant if is_packed(variant) else variant.with_(precision="ieee")
    return verify(small(problem, variant), allowed, load(problem, variant).launch, "cpu", seed)


def failures(results: Iterable[Accuracy]) -> Iterator[str]:
    """One sentence per output outside its budget."""
    for result in results:
        if not result.ok:
            yield f"{result.output}: error {result.error:.3g} exceeds the budget {result.budget:.3g}"
