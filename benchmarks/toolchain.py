"""What the tools themselves cost on this machine: `python benchmarks/toolchain.py [--seconds 60]`.

Variants compiled and predicted per minute on all cores, `otgen --help` as a whole process, and what `import otgen` takes. Writes
benchmarks/results/cpu/toolchain.json. Whole-process times are medians of seven runs after one that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from otgen.candidates import by_mode, first_variants, legal_variants
from otgen.compile import inspect_variants
from otgen.families import FAMILIES
from otgen.gpus import gpu
from otgen.model import predict
from otgen.pool import Pool, Role
from otgen.run import GROUP
from otgen.workload import launch_costs

RESULT = Path(__file__).parent / "results" / "cpu" / "toolchain.json"


def whole_process_ms(*command: str) -> float:
    """Median wall milliseconds of a command."""
    times = []
    for _ in range(8):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def variants_per_minute(seconds: float, slug: str = "a100") -> tuple[float, int]:
    """What a fresh `otgen tune` tries first for every family at 4096×4096×64, in all precision modes, compiled and predicted.

    Failures count as what they are, work done.
    """
    target, chooser = gpu(slug), random.Random(0)
    problems = [kind.problem(4096, 4096, 64, **flags) for kind in FAMILIES.values() for flags in kind.standard(4096, 4096, 64)]
    tasks = []
    for problem in problems:
        first = [
            variant
            for legal in by_mode(legal_variants(problem, target)).values()
            for variant in first_variants(problem, target, legal, [], 6)
        ]
        chooser.shuffle(first)
        tasks += [(problem, first[start : start + GROUP]) for start in range(0, len(first), GROUP)]
    chooser.shuffle(tasks)
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TRITON_INTERPRET": None, "TRITON_CACHE_DIR": cache, "OTGEN_CACHE": cache}
        with Pool(compile=Role(os.cpu_count() or 1, 120.0, environment)) as pool:
            for problem, variants in tasks[:2]:
                pool.submit("compile", None, inspect_variants, problem, variants, slug)
            list(pool.outcomes())  # the workers' imports are not the compiler's speed
            began, done, waiting = time.monotonic(), 0, iter(tasks[2:])
            while time.monotonic() - began < seconds:
                while len(pool) < 4 and (task := next(waiting, None)):
                    pool.submit("compile", task, inspect_variants, *task, slug)
                if not len(pool):
                    break
                outcome = pool.next()
                problem, variants = outcome.key
                for variant, inspection in zip(variants, outcome.value):
                    if inspection.error is None:
                        predict(target, launch_costs(problem, variant, target, inspection.launches))
                done += len(variants)
            return 60.0 * done / (time.monotonic() - began), done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    rate, done = variants_per_minute(options.seconds)
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "variants_per_minute": round(rate, 1),
        "variants": done,
        "help_ms": round(whole_process_ms("-m", "otgen", "--help"), 1),
        "import_otgen_ms": round(whole_process_ms("-c", "import otgen"), 1),
        "empty_process_ms": round(whole_process_ms("-c", ""), 1),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
