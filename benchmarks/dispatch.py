"""How long a dispatch takes: the first question about a problem, and the same question again.

python benchmarks/dispatch.py
"""

from __future__ import annotations

import statistics
import timeit
import warnings

from otgen.dispatch import Dispatcher
from otgen.families import family
from otgen.precision import MODES

REPEATS, CALLS = 15, 20_000


def main() -> None:
    warnings.simplefilter("ignore")
    problem = family("sinkhorn").problem(4096, 4096, 64)
    question = (problem.family, "a100", problem.n, problem.m, problem.d, problem.dtype, problem.flags, tuple(MODES))
    dispatcher = Dispatcher()
    first = timeit.timeit(lambda: dispatcher.choose(*question), number=1)
    again = statistics.median(timeit.repeat(lambda: dispatcher.choose(*question), repeat=REPEATS, number=CALLS)) / CALLS
    print(f"first question {first * 1e3:.2f} ms; same question again {again * 1e6:.2f} µs (target: at most 2 µs)")


if __name__ == "__main__":
    main()
