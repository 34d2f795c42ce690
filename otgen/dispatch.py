"""From a problem to the kernel that computes it: a dictionary when it was asked before, the tuning databases when not.

`Choice.cache` says where the variant comes from:

    exact       measured on this GPU, for these d, dtype and flags, and for n and m of the same bucket (nearest power of two)
    nearest     measured on this GPU, for another shape (or another width: an integer flag)
    ported      measured on another GPU of the same architecture
    predicted   ranked by the model, for this shape or the nearest; never timed
    default     nothing that was tuned fits: the family's default variant
    pinned      `pin` was called for these flags, or the caller named the variant

This is also the order of preference, save that a prediction comes before a measured row further away than `otgen.ranking.REACH`.
Every answer but an exact one is said once, with the command that cures it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otgen import families, gpus
from otgen.errors import NoValidVariant, StoreError, UsageError, unknown
from otgen.precision import of_family
from otgen.problem import LARGEST_DIMENSION, Problem, Value, Variant, bucket
from otgen.ranking import Cache, Candidate, centre, ranked, stale
from otgen.standard import flag_words
from otgen.store import TuningWarning, Winner, default_path, overlay, read_winners, shipped

if TYPE_CHECKING:
    import torch

Flags = tuple[tuple[str, Value], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A variant and where it comes from; `source` is the database row, None for a default."""

    variant: Variant
    cache: Cache
    source: Winner | None = None

    @property
    def precision(self) -> str:
        return str(self.variant["precision"])


@dataclass(frozen=True, slots=True)
class Kernel:
    """A choice and the ``launch(**arguments)`` of the module rendered for it."""

    choice: Choice
    launch: Callable[..., None]


@dataclass(frozen=True, slots=True)
class Source:
    """A database looked into: its sound rows of one family, and what is wrong with the file or with other rows."""

    path: Path
    winners: Sequence[Winner]
    complaints: Sequence[str]


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a choice came about: the files, the rows looked at (best first, the last one taken unless refused), the choice."""

    sources: Sequence[Source]
    considered: Sequence[Candidate]
    choice: Choice


class Dispatcher:
    """Chooses variants from `databases`, later ones overlaying earlier ones; by default the shipped ones and the user's.

    Every answer is remembered until `forget`, one per bucket of n and m: families and templates may look at n and m only as orders
    of magnitude.
    """

    def __init__(self, databases: Sequence[Path] | None = None) -> None:
        self._databases = databases
        self._choices: dict[tuple[Any, ...], Choice] = {}
        self._kernels: dict[tuple[Any, ...], Kernel] = {}
        self._sources: dict[tuple[str, int | str], list[Source]] = {}
        self._us_per_pair: dict[tuple[Any, ...], float] = {}
        self._detected: dict[str, gpus.Gpu] = {}
        self._said: set[str] = set()
        self._pins: dict[tuple[str, Flags], Variant] = {}

    def pin(self, family: str, *, variant: Mapping[str, Value], **flags: Value) -> None:
        """Take `variant` for every problem of `family` with these flags, whatever the databases hold; `otgen tune` prints the line.

        A problem it does not fit raises NoValidVariant when it is asked for. Raises UsageError for an unknown family, flag or axis.
        """
        kind = families.family(family)
        problem = kind.problem(1, 1, 1, **flags)
        largest = kind.problem(1, 1, LARGEST_DIMENSION, **flags)
        self._pins[family, problem.flags] = kind.check(largest, variant)
        self.forget()

    def forget(self) -> None:
        """Read the databases again at the next question."""
        for memory in (self._choices, self._kernels, self._us_per_pair, self._sources):
            memory.clear()

    def choose(self, family: str, gpu: str, n: int, m: int, d: int, dtype: str, flags: Flags, modes: tuple[str, ...]) -> Choice:
        """The variant for a problem: of the nearest winners, the fastest whose precision is among `modes`.

        flags  complete and sorted, as `Problem.flags` is
        Raises UsageError for an unknown family, GPU or dtype or an empty size, NoValidVariant when not even the default fits.
        """
        key = (family, gpu, bucket(n), bucket(m), d, dtype, flags, modes)
        choice = self._choices.get(key)
        if choice is None:
            choice = self._choices[key] = self._resolve(Problem(family, n, m, d, dtype, flags), gpu, modes)
        return choice

    def kernel(self, family: str, gpu: str, n: int, m: int, d: int, dtype: str, flags: Flags, modes: tuple[str, ...]) -> Kernel:
        """`choose`, and the launch of the module rendered for the choice; only the first call of a bucket imports a renderer."""
        key = (family, gpu, bucket(n), bucket(m), d, dtype, flags, modes)
        kernel = self._kernels.get(key)
        if kernel is None:
            from otgen.prepared import prepared
            from otgen.render import load

            choice = self.choose(family, gpu, n, m, d, dtype, flags, modes)
            module = load(centre(Problem(family, n, m, d, dtype, flags)), choice.variant)
            kernel = self._kernels[key] = Kernel(choice, prepared(module))
        return kernel

    def us_per_pair(self, family: str, gpu: str, n: int, m: int, d: int, dtype: str, flags: Flags, modes: tuple[str, ...]) -> float:
        """Microseconds for each pair of points of the row that `choose` would take; infinite for the default, 0 when pinned.

        Measured or predicted, and perhaps of another size, d or GPU of the architecture: for deciding between families, in silence.
        """
        key = (family, gpu, bucket(n), bucket(m), d, dtype, flags, modes)
        known = self._us_per_pair.get(key)
        if known is None:
            choice = self.explain(Problem(family, n, m, d, dtype, flags), gpu, modes).choice
            row, other = choice.source, math.inf if choice.cache == "default" else 0.0
            known = other if row is None else row.us / (row.problem.n * row.problem.m * row.problem.batch)
            self._us_per_pair[key] = known
        return known

    def named(self, family: str, gpu: str, n: int, m: int, d: int, dtype: str, flags: Flags, variant: Variant) -> Kernel:
        """`variant` and the launch of the module rendered for it, whatever else is tuned. Raises NoValidVariant when it misfits."""
        key = (family, gpu, bucket(n), bucket(m), d, dtype, flags, variant)
        kernel = self._kernels.get(key)
        if kernel is None:
            from otgen.prepared import prepared
            from otgen.render import load

            target = centre(Problem(family, n, m, d, dtype, flags))
            choice = _pinned(variant, target, self._gpu(gpu))
            kernel = self._kernels[key] = Kernel(choice, prepared(load(target, variant)))
        return kernel

    def explain(self, problem: Problem, gpu: str, modes: tuple[str, ...]) -> Explanation:
        """What `choose` answers for `problem`, and why; in modes as accurate where the family has none of `modes`.

        Raises as `choose` does.
        """
        entry, target = self._gpu(gpu), centre(problem)
        pinned = self._pins.get((problem.family, problem.flags))
        if pinned is not None:
            return Explanation((), (), _pinned(pinned, target, entry))
        kind = families.family(problem.family)
        modes = of_family(modes, tuple(map(str, kind.axes(target)["precision"])))
        sources = self._load(kind.name, entry)
        winners = overlay((source.winners for source in sources), stale)
        considered = []
        for candidate in ranked(winners, target, entry, modes):
            considered.append(candidate)
            if not candidate.refused:
                return Explanation(sources, considered, Choice(candidate.variant, candidate.cache, candidate.winner))
        return Explanation(sources, considered, _default(target, entry, modes))

    def current_gpu(self, device: torch.device | int | None = None) -> str:
        """The slug of the GPU that torch sees as `device`, its current one by default.

        A GPU that is not in the table gets the winners of its architecture, and that is said once. Raises OtgenError when there is
        no GPU or none of its architecture is known.
        """
        import torch

        index = device.index if isinstance(device, torch.device) else device
        found = gpus.detect(torch.cuda.current_device() if index is None else index)
        if found.slug not in gpus.GPUS:
            self._detected[found.slug] = found
            kin = [entry.slug for entry in gpus.GPUS.values() if entry.arch == found.arch]
            self._say(
                f"{found.name} is not in otgen's table of GPUs; its kernels are ported from {' and '.join(kin) or 'none'} "
                f"of the same architecture, {found.arch}"
            )
        return found.slug

    def _gpu(self, slug: str) -> gpus.Gpu:
        return self._detected.get(slug) or gpus.gpu(slug)

    def _resolve(self, problem: Problem, gpu: str, modes: tuple[str, ...]) -> Choice:
        explanation = self.explain(problem, gpu, modes)
        for source in explanation.sources:
            for complaint in source.complaints:
                self._say(complaint)
        choice = explanation.choice
        if choice.cache not in ("exact", "pinned"):
            refusals = [c.refused for c in explanation.considered if c.refused and c.winner.precision in modes]
            refused = f" (a better row was refused, {refusals[0]})" if refusals else ""
            self._say(f"{problem} on {gpu}: {reason(choice)}{refused}; run `{cure(problem, gpu)}`")
        return choice

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, TuningWarning, stacklevel=4)

    def _load(self, family: str, gpu: gpus.Gpu) -> list[Source]:
        """The rows of `family` for the GPUs of `gpu`'s architecture, a source per file, read once."""
        key = family, gpu.arch
        if key not in self._sources:
            kin = {gpu.slug, *(entry.slug for entry in gpus.GPUS.values() if entry.arch == gpu.arch)}
            files = self._databases
            if files is None:
                files = [*(path for path in shipped() if path.stem in kin), *(path for path in (default_path(),) if path.exists())]
            self._sources[key] = [_read(path, family, kin) for path in files]
        return self._sources[key]


def _read(path: Path, family: str, kin: set[str]) -> Source:
    """The rows that lie in the declared space of their own problem; whatever else is found becomes a complaint."""
    complaints: list[str] = []
    winners = []
    try:
        rows = [row for row in read_winners(path, family=family, complain=complaints.append) if row.gpu in kin]
    except StoreError as error:
        return Source(path, (), (str(error),))
    for winner in rows:
        try:
            _check(winner)
            winners.append(winner)
        except UsageError as error:
            complaints.append(f"skipped the row {winner.problem} {winner.precision} of {path}: {error}; tune that problem again")
    return Source(path, winners, complaints)


def _check(winner: Winner) -> None:
    """Raise UsageError when a row holds a flag, axis or value that its family does not declare."""
    kind, problem = families.family(winner.problem.family), winner.problem
    for name, _ in problem.flags:
        if name not in kind.flags:
            raise unknown(f"flag of {kind.name}", name, kind.flags)
    kind.problem(problem.n, problem.m, problem.d, problem.dtype, **dict(problem.flags))
    if not stale(winner):
        kind.check(problem, winner.variant)


def _default(target: Problem, gpu: gpus.Gpu, modes: tuple[str, ...]) -> Choice:
    """The family's default, in its own precision when that is admissible, else in the most accurate mode that fits."""
    family = families.family(target.family)
    variant = family.default(target)
    for mode in sorted(modes, key=lambda mode: mode != variant["precision"]):
        if not family.fits(target, variant.with_(precision=mode), gpu):
            return Choice(variant.with_(precision=mode), "default")
    raise NoValidVariant(
        f"expected a variant of {target} for {gpu.slug} in precision {' or '.join(modes)}; neither a tuned one nor the default "
        f"fits; run `{cure(target, gpu.slug)}`"
    )


def _pinned(variant: Variant, target: Problem, gpu: gpus.Gpu) -> Choice:
    family = families.family(target.family)
    try:
        misfit = family.fits(target, family.check(target, variant), gpu)
    except UsageError as error:
        misfit = str(error)
    if misfit:
        raise NoValidVariant(f"expected the pinned variant to fit {target} on {gpu.slug}; it does not: {misfit}; pin another one")
    return Choice(variant, "pinned")


def reason(choice: Choice) -> str:
    """What a choice rests on, in a clause."""
    if choice.cache == "pinned":
        return "otgen.pin was called for it"
    if choice.source is None:
        return "nothing tuned for its architecture fits, the default variant is used"
    row = f"{choice.source.problem.shape} on {choice.source.gpu}"
    if choice.cache == "predicted":
        return f"the winner predicted for {row} is used, which was never timed"
    return f"the winner measured for {row} is used"


def cure(problem: Problem, gpu: str) -> str:
    """The command that gives `problem` a winner of its own; on a machine with the GPU, a measured one."""
    dtype = "" if problem.dtype == "fp32" else f" --dtype {problem.dtype}"
    flags = "".join(f" --flag {word}" for word in flag_words(problem))
    return f"otgen tune --gpu {gpu} --family {problem.family} --shape {problem.shape}{dtype}{flags}"


_DISPATCHER = Dispatcher()
choose = _DISPATCHER.choose
kernel = _DISPATCHER.kernel
us_per_pair = _DISPATCHER.us_per_pair
named = _DISPATCHER.named
explain = _DISPATCHER.explain
current_gpu = _DISPATCHER.current_gpu
forget = _DISPATCHER.forget
pin = _DISPATCHER.pin
