"""Which kernels a solve may launch: a variant that the caller names, and what becomes of problems that nothing was tuned for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from otgen import ops
from otgen.errors import InputError, NoValidVariant, UsageError
from otgen.ops import Flags
from otgen.override import Override
from otgen.solvers.inputs import Clouds
from otgen.solvers.steps import Steps

if TYPE_CHECKING:
    from otgen.problem import Problem

_SEEN: set[tuple[Any, ...]] = set()
"""What was tuned, or found in order, in this process: databases are ranked once for each, and no fruitless search is repeated."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a solve launches.

    tune   "cache": what dispatch chooses;  "now": the same, once it is measured here;  "off": the same, but no default variant
    named  the launches of its loop that take a variant of the caller's, and the variant; None: dispatch chooses
    """

    tune: str = "cache"
    named: Override | None = None

    def ready(self, method: str, steps: Steps, *, annealed: bool = False) -> None:
        """Tunes, or refuses, what a loop of `method` will launch, before it does; nothing of a streamed problem.

        annealed  whether stages come first
        Raises NoValidVariant for what would run in the default variant under tune="off".
        """
        if self.tune == "cache" or ops.streamed(steps.clouds.x):
            return
        from otgen import dispatch
        from otgen.problem import Problem
        from otgen.ranking import centre
        from otgen.store import default_path

        for family, x, y, flags in _launches(method, steps, annealed):
            if self.named is not None and self.named[:2] == (family, flags):
                continue
            _, gpu, n, m, d, dtype, complete = ops.question(family, x, y, flags)
            problem = Problem(family, n, m, d, dtype, complete)
            seen = self.tune, centre(problem), gpu, steps.modes, default_path()
            if seen in _SEEN:
                continue
            choice = dispatch.explain(problem, gpu, steps.modes).choice
            if self.tune == "now" and choice.cache not in ("exact", "pinned"):
                _tune(problem, gpu, x)
            elif self.tune == "off" and choice.cache == "default":
                raise NoValidVariant(
                    f"expected a tuned variant of {problem} on {gpu} with tune='off'; {dispatch.reason(choice)} otherwise; "
                    f"run `{dispatch.cure(problem, gpu)}`, or type tune='cache'"
                )
            _SEEN.add(seen)


def flags_of(method: str) -> Flags:
    """The flags of the sinkhorn launches that a method's loop makes."""
    return ops.SYMMETRIC if method == "symmetric" else ops.ALTERNATING


def kernels_of(
    variant: Any, tune: str, method: str, clouds: Clouds, precision: str, modes: Callable[[str], tuple[str, ...]]
) -> tuple[Kernels, tuple[str, ...]]:
    """What a solve launches, and the precision modes it may take: those of `precision`, or the one of `variant`.

    variant  "auto", or a value for each axis of family sinkhorn
    modes    precision → its modes (`otgen.solvers.options.precision_modes`)

    Raises UsageError for what is no variant of the family; InputError where no kernel runs, and for one in another precision.
    """
    allowed = modes(precision)
    if isinstance(variant, str) and variant == "auto":
        return Kernels(tune), allowed
    if not isinstance(variant, Mapping):
        raise UsageError(
            f"expected variant='auto' or a mapping of axes, as otgen.pin takes; got {variant!r}; type variant=dict(result.variant)"
        )
    if ops.streamed(clouds.x):
        came = f"{str(clouds.x.dtype).removeprefix('torch.')} points on {clouds.x.device}"
        raise InputError(
            f"expected float32 points on a GPU for variant; got {came}, where there is no kernel to choose; type variant='auto'"
        )
    from otgen.families import family

    kind, flags = family("sinkhorn"), flags_of(method)
    _, _, n, m, d, dtype, complete = ops.question(kind.name, clouds.x, clouds.y, flags)
    chosen = kind.check(kind.problem(n, m, d, dtype, **dict(complete)), variant)
    mode = str(chosen["precision"])
    if precision != "auto" and allowed != (mode,):
        raise InputError(f"expected one precision; got precision={precision!r} and a variant in {mode}; leave precision out")
    return Kernels(tune, (kind.name, flags, chosen)), modes(mode)


def _launches(method: str, steps: Steps, annealed: bool) -> Iterator[tuple[str, Tensor, Tensor, Flags]]:
    """family, x, y and flags of all that a loop launches."""
    x, y = steps.clouds.x, steps.clouds.y
    yield from (("sinkhorn", *sides, flags) for flags in steps.listed for sides in ((x, y), (y, x)))
    if method == "own":
        yield "sinkhorn", x, x, ops.OWN
        return
    if method == "symmetric":
        yield "sinkhorn", x, y, ops.SYMMETRIC
    sides = [(x, y), (y, x)] if x.shape != y.shape else [(x, y)]
    for one, other in sides:
        if method != "symmetric" or annealed:
            yield "sinkhorn", one, other, ops.ALTERNATING
        if method == "newton":
            yield "hvp", one, other, ops.MATVEC


def _tune(problem: Problem, gpu: str, x: Tensor) -> None:
    """Tunes a problem into the user's database, as `otgen tune` does: measured where `x` is on a GPU, else predicted."""
    from otgen import dispatch, gpus, tuner
    from otgen.render import cache_is_writable
    from otgen.store import Store, default_path

    cache_is_writable()
    target = gpus.detect(x.device.index) if x.is_cuda else gpus.gpu(gpu)
    with Store.open(default_path()) as store:
        for _ in tuner.tune([problem], target, store, tuner.Settings(measured=x.is_cuda), lambda progress: None):
            pass
    dispatch.forget()
