"""Issue slots per pair of the shipped winners for the symmetric step, both sums, at 4096×4096×64: `python benchmarks/static.py`.

Compiles each precision mode's winner for a100 and h100 and counts the hot loops of all its launches: exact, and needs no GPU.
Beside them stands what flash-sinkhorn 0.4.1's best shipped configuration takes at TF32 (docs/performance.md has the source).
Writes benchmarks/results/static/slots.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from otgen.compile import inspect_variants
from otgen.families import family
from otgen.gpus import gpu
from otgen.pool import Pool, Role
from otgen.store import read_winners, shipped

RESULT = Path(__file__).parent / "results" / "static" / "slots.json"
FLASH_SINKHORN = {"a100": 26.9, "h100": 24.4}


def main() -> None:
    problem = family("sinkhorn").problem(4096, 4096, 64, schedule="symmetric")
    rows = []
    with Pool(compile=Role(2, 120.0, {"TRITON_INTERPRET": None})) as pool:
        for path in shipped():
            for winner in read_winners(path, family="sinkhorn"):
                if winner.problem == problem and winner.gpu in FLASH_SINKHORN:
                    pool.submit("compile", winner, inspect_variants, problem, [winner.variant], winner.gpu)
        for outcome in pool.outcomes():
            winner, launches = outcome.key, outcome.value[0].launches
            sweeps = family("sinkhorn").work(problem, winner.variant).launches
            warps, lanes = winner.variant.int("num_warps"), gpu(winner.gpu).warp_size
            tile = winner.variant.int("BLOCK_M") * winner.variant.int("BLOCK_N")
            visited = [sweep.programs * sweep.tiles * tile for sweep in sweeps]
            pairs = problem.n * problem.m
            slots = sum(v * launch.mix.slots * warps * lanes / tile for v, launch in zip(visited, launches)) / pairs
            mufu = sum(v * launch.mix.mufu * warps * lanes / tile for v, launch in zip(visited, launches)) / pairs
            rows.append(
                {
                    "gpu": winner.gpu,
                    "precision": winner.precision,
                    "issue_slots_per_pair": round(slots, 2),
                    "mufu_per_pair": round(mufu, 3),
                    "spilled_bytes": sum(launch.spills for launch in launches),
                    "registers": max(launch.registers for launch in launches),
                    "predicted_us": round(winner.us, 1),
                    "variant": dict(winner.variant),
                    "flash_sinkhorn_0.4.1_tf32": FLASH_SINKHORN[winner.gpu],
                }
            )
    rows.sort(key=lambda row: (str(row["gpu"]), float(str(row["predicted_us"]))))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(
            *(row[name] for name in ("gpu", "precision", "issue_slots_per_pair", "mufu_per_pair", "spilled_bytes", "predicted_us"))
        )


if __name__ == "__main__":
    main()
