"""What an earlier template taught, carried over to the present one wherever both render to the same kernels.

Every edit of a template, a comment of otgen.blocks even, changes its hash, and with it all its winners are stale. Most edits leave
most kernels as they are, though, and nothing else is compiled: equal digests (`otgen.render.kernels_digest`) are equal binaries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from otgen.compile import compile_key
from otgen.errors import UsageError
from otgen.families import family
from otgen.gpus import Gpu
from otgen.problem import Problem, Variant
from otgen.render import kernels_digest, source
from otgen.store import PastTrial, Store


def carry(problems: Sequence[Problem], gpu: Gpu, store: Store) -> Counter[Problem]:
    """Inserts trials of `problems` on the templates of stale winners again, as ones of the present template; counts them.

    Only those whose kernels the present template still renders; failures too, so that a search goes on where it was. In one
    transaction with the new decisions: what is interrupted leaves nothing, and what is repeated finds nothing left to carry.
    """
    triton = version("triton")
    holds: dict[int, bool] = {}
    found: dict[Problem, dict[PastTrial, str | None]] = {}
    for problem in dict.fromkeys(problems):
        for trial in store.outdated(problem, gpu.slug):
            if trial.compile not in holds:
                holds[trial.compile] = trial.source_hash in digests(problem, trial.variant)
            if holds[trial.compile]:
                key = compile_key(problem, trial.variant, gpu) if trial.triton == triton else None
                found.setdefault(problem, {})[trial] = key
    if found:
        store.carry(gpu.slug, found)
    return Counter({problem: len(trials) for problem, trials in found.items()})


def digests(problem: Problem, variant: Variant) -> Iterator[str]:
    """Of the present renders of all variants that compile alike: one binary stands for them, and the digest may be of any."""
    kind = family(problem.family)
    try:
        yield kernels_digest(source(problem, variant))
        for other in kind.grids(problem, variant):
            if other != variant and kind.same_kernels(other) == kind.same_kernels(variant):
                yield kernels_digest(source(problem, other))
    except UsageError:
        return  # outside the space that the family has now
