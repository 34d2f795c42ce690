"""Everything that needs a GPU, in one command of under nine minutes:  python benchmarks/gpu.py [--out DIR] [PART ...]

    tests        the tests marked gpu, beside what flash-sinkhorn's autotuner compiles ahead (`peers.py --prepare`)
    tune         a small set tuned by measuring (`otgen tune --gpu auto`) into DIR/tuning.db
    prediction   the model's ranking against those measurements (`prediction.py`)
    peers        otgen, on the winners just measured, against others (`peers.py`), for as long as time is left
    sizes        otgen against flash-sinkhorn on whole calls (`sizes.py`); only when named, since the others take all the time

Each part is a process with a time limit: at its end it is interrupted, and killed if that does not help. A part that fails does not
stop the others. DIR, benchmarks/results/<gpu> by default, gets log.txt, prepare.txt, tuning.db, prediction.json, peers.json,
peers.png, sizes.json and gpu.json. The last lines printed are a table of the parts. Exit code 0 when all parts ended well, 1 when
one did not, 2 without a GPU. Nothing is installed or downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TOTAL = 500.0
"""Seconds for all parts together."""

GRACE = 15.0
"""Seconds between the interruption of a part and its end by force."""

LIMITS = {"tests": 150.0, "tune": 150.0, "prediction": 30.0, "peers": 400.0, "sizes": 345.0}
"""The most seconds a part may take, in the order they run; none gets more than is left of the total."""

APART = ("sizes",)
"""Parts that run only when they are named."""

PREPARATION = 120.0
"""Seconds the autotuner's compilations may take beyond the end of the tests."""

TUNED = ("4096x4096x64", "16384x16384x64", "16384x16384x3")
TRIALS = 12
JOBS = 4
"""Compilers beside the one process that measures: what is compiled and not measured when the time is up is waited for."""

Command = Callable[[Path, float], list[str]]


def tests(out: Path, seconds: float) -> list[str]:
    """pytest without the repository's own options: plugins may be missing here, and a warning is no failure."""
    parallel = ["-n", "8"] if find_spec("xdist") else []
    options = ["-q", "-ra", "-m", "gpu", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", *parallel]
    return [sys.executable, "-m", "pytest", "tests/test_gpu.py", *options]


def tune(out: Path, seconds: float) -> list[str]:
    shapes = [word for shape in TUNED for word in ("--shape", shape)]
    limits = ["--max-trials", str(TRIALS), "--budget", f"{max(10.0, seconds - 40.0):.0f}s", "-j", str(JOBS)]
    return [
        sys.executable,
        "-m",
        "otgen",
        "tune",
        "--gpu",
        "auto",
        "--family",
        "sinkhorn",
        *shapes,
        *limits,
        "--db",
        str(out / "tuning.db"),
    ]


def prediction(out: Path, seconds: float) -> list[str]:
    return [sys.executable, "benchmarks/prediction.py", str(out / "tuning.db"), "--out", str(out / "prediction.json")]


def peers(out: Path, seconds: float) -> list[str]:
    return [sys.executable, "benchmarks/peers.py", "--out", str(out), "--budget", f"{max(10.0, seconds - 60.0):.0f}"]


def sizes(out: Path, seconds: float) -> list[str]:
    return [sys.executable, "benchmarks/sizes.py", "--out", str(out), "--budget", f"{max(10.0, seconds - 45.0):.0f}"]


def prepare(out: Path, seconds: float) -> list[str]:
    return [sys.executable, "benchmarks/peers.py", "--prepare"]


PARTS: dict[str, Command] = {"tests": tests, "tune": tune, "prediction": prediction, "peers": peers, "sizes": sizes}


@dataclass(frozen=True)
class Ended:
    """How a part went: "ok", "failed" (with its exit code) or "out of time", and what it printed."""

    part: str
    outcome: str
    seconds: float
    output: str

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else ""


class Running:
    """A part's process, in a process group of its own, whose output is appended to a log."""

    def __init__(self, part: str, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.part, self._log, self._began = part, log, time.monotonic()
        with log.open("ab") as file:
            file.write(f"\n===== {part}: {' '.join(command)}\n".encode())
            self._offset = file.tell()
            file.flush()
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def end(self, seconds: float) -> Ended:
        """Wait for the process, and stop it and its children when it takes longer than `seconds` from now."""
        try:
            code = self._process.wait(max(0.0, seconds))
            outcome = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
            os.killpg(self._process.pid, signal.SIGINT)
            try:
                self._process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        with self._log.open("rb") as file:
            file.seek(self._offset)
            output = file.read().decode(errors="replace")
        return Ended(self.part, outcome, time.monotonic() - self._began, output)


def environment(out: Path) -> dict[str, str]:
    """The children's: compiled kernels, this checkout's otgen, the database that `tune` writes."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0", "OTGEN_DB": str(out / "tuning.db"), "PYTHONUNBUFFERED": "1"}


def run(names: Sequence[str], parts: dict[str, Command], out: Path, total: float, background: Command | None) -> list[Ended]:
    """Run the parts in order; `background` starts with the first one and is over before the second."""
    deadline = time.monotonic() + total
    log, variables = out / "log.txt", environment(out)
    aside = Running("prepare", background(out, total), out / "prepare.txt", variables) if background else None
    results = []
    for name in names:
        seconds = min(LIMITS.get(name, total), deadline - time.monotonic())
        if seconds <= 0:
            results.append(Ended(name, "not begun", 0.0, "no time was left"))
            continue
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        results.append(Running(name, parts[name](out, seconds), log, variables).end(seconds))
        print(f"{name}: {results[-1].outcome} after {results[-1].seconds:.0f} s", flush=True)
        if aside:
            results.append(aside.end(min(PREPARATION, deadline - time.monotonic())))
            aside = None
    return results


def table(results: Sequence[Ended]) -> str:
    lines = [f"{'part':12} {'outcome':14} {'seconds':>8}  last line"]
    lines += [f"{result.part:12} {result.outcome:14} {result.seconds:8.0f}  {result.last_line[:120]}" for result in results]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Test, tune and compare on this machine's GPU.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all but {', '.join(APART)} by default")
    parser.add_argument("--out", type=Path, help="folder to write to; benchmarks/results/<gpu> by default")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for all parts together")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"expected parts among {', '.join(PARTS)}; got {unknown[0]!r}")
    import torch

    if not torch.cuda.is_available():
        print("expected a CUDA device; torch sees none; run this on a machine with an NVIDIA GPU", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))  # a checkout need not be installed
    from otgen.gpus import detect

    names = [name for name in PARTS if name in (options.parts or PARTS.keys() - set(APART))]
    out = (options.out or ROOT / "benchmarks" / "results" / detect().slug).resolve()
    out.mkdir(parents=True, exist_ok=True)
    ahead = prepare if "peers" in names and find_spec("flash_sinkhorn") else None
    results = run(names, PARTS, out, options.total, ahead)
    (out / "gpu.json").write_text(
        json.dumps([asdict(result) | {"output": result.last_line} for result in results], indent=1) + "\n"
    )
    for result in results:
        if result.part != "prepare" or result.outcome != "ok":
            print(f"\n----- {result.part}\n{result.output[-2600:].strip()}")
    print(f"\nEverything is in {out}.\n{table(results)}")
    return 0 if all(result.outcome == "ok" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
