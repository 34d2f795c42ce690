"""What every family of streamed tiles shares: the axes of a tile, when a tile is legal, test clouds, and rounding budgets."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

from otgen.precision import LOG2_E, MODES, rounded
from otgen.problem import BYTES, Problem, Spec, Sweep, Value, Variant

if TYPE_CHECKING:
    import torch

    from otgen.gpus import Gpu

SCORE_REGISTERS = 128
"""fp32 entries of the score tile a thread may hold: half of its 255 registers, the rest is operands and sums."""

TILE_REGISTERS = 192
"""fp32 entries of the score tile and the output tile together."""

UNROLLED_FMAS = 4096
"""Multiply-adds per thread and product without a tensor core: the compiler unrolls them all."""

FIRST_COPY_UNIT = 90
"""The first architecture whose SMs copy tiles to shared memory by tensor descriptor (TMA)."""

DESCRIPTOR_UNIT = 16
"""Bytes that a tensor's rows in memory, and its first one's address, are multiples of for a tensor descriptor."""

LN2 = 0.6931471805599453

FP32_SLACK = 2.0**-20
"""Relative error granted to a score's fp32 terms: sixteen units in the last place for the product's sum and the biases."""


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`, and at least 16, the smallest side of a product."""
    return max(16, 1 << (size - 1).bit_length())


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    return tuple(1 << e for e in range(low.bit_length() - 1, high.bit_length()))


TILE_AXES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_W", "num_warps", "num_stages", "precision")
"""What `tile_misfit` looks at."""


def tile_axes(problem: Problem) -> dict[str, tuple[Value, ...]]:
    """The axes common to all families. BLOCK_K ≥ d keeps the row block's coordinates resident."""
    return {
        "BLOCK_M": powers_of_two(16, 256),
        "BLOCK_N": powers_of_two(16, 256),
        "BLOCK_K": powers_of_two(16, min(256, power_of_two(problem.d))),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3, 4),
        "precision": tuple(mode.name for mode in MODES.values() if not mode.only_packed),
        "stabiliser": ("running", "shifted"),
    }


def width_axis(width: int) -> tuple[Value, ...]:
    """BLOCK_W: output columns per program; a wider output than one block computes its scores once per block."""
    return powers_of_two(16, min(256, power_of_two(width)))


def default_tile(problem: Problem) -> dict[str, Value]:
    """A tile that compiles on every GPU of the table and is accurate in every regime; nobody claims it is fast."""
    return {
        "BLOCK_M": 64,
        "BLOCK_N": 32,
        "BLOCK_K": min(32, power_of_two(problem.d)),
        "num_warps": 4,
        "num_stages": 2,
        "precision": "ieee" if problem.dtype == "fp32" else problem.dtype,
        "stabiliser": "running",
    }


def is_resident(problem: Problem, variant: Variant) -> bool:
    return variant.int("BLOCK_K") >= problem.d


def tile_misfit(problem: Problem, variant: Variant, gpu: Gpu) -> str:
    """Why a tile cannot work on `gpu`, or "". Each clause gives its reason; the target's compiler has the last word."""
    block_m, block_n, block_k = (variant.int(axis) for axis in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    block_w = variant.int("BLOCK_W") if "BLOCK_W" in variant else 0
    warps, stages = variant.int("num_warps"), variant.int("num_stages")
    threads = warps * gpu.warp_size
    precision = str(variant["precision"])

    if problem.dtype != "fp32" and precision != problem.dtype:
        return f"{problem.dtype} coordinates hold no more than a {problem.dtype} product uses"
    if block_w and precision == "fp16" and problem.dtype != "fp16":
        return "weights of about 1/m are subnormal in the second product's fp16"
    if gpu.backend == "hip" and precision in ("tf32", "tf32x3"):
        return f"{precision} products are NVIDIA's"
    if (block_m // 16) * (block_n // 8) < warps:
        return "a warp would have no 16×8 fragment of the score"
    if block_m * block_n > SCORE_REGISTERS * threads:
        return f"the score tile needs more than {SCORE_REGISTERS} registers a thread"
    if block_m * (block_n + block_w) > TILE_REGISTERS * threads:
        return f"score and output tiles need more than {TILE_REGISTERS} registers a thread"
    if precision == "ieee" and block_m * block_n * max(block_k, block_w) > UNROLLED_FMAS * threads:
        return f"more than {UNROLLED_FMAS} multiply-adds a thread would be unrolled"
    if block_k < min(32, power_of_two(problem.d)):
        return "reading fewer than 32 coordinates at a time starves the product"
    operand = BYTES[problem.dtype]
    row_block = block_m * block_k * (4 if is_resident(problem, variant) else operand)
    column_block = block_n * block_k * operand
    if row_block + max(1, stages - 1) * column_block > gpu.shared_per_block:
        return f"the operands exceed {gpu.shared_per_block} bytes of shared memory"
    return ""


def is_by_columns(variant: Variant) -> bool:
    """Whether tiles are held columns by rows, since a product adds their biases."""
    return variant.get("bias", "added") != "added"


def is_packed(variant: Variant) -> bool:
    """Whether operands are packed by a launch of their own (`otgen.families.packed`)."""
    return variant.get("operands", "stored") == "packed"


def bias_depth(variant: Variant) -> int:
    """Depth of the product that adds the biases and nothing else; 0 without one."""
    return 16 if is_by_columns(variant) and not is_packed(variant) else 0


def across_warps(gpu: Gpu, rows: int, warps: int) -> bool:
    """Whether one matrix instruction of `gpu` spans four warps when they multiply a tile of so many rows (wgmma, tcgen05)."""
    return gpu.arch in (90, 100) and rows >= 64 and warps >= 4


def bias_misfit(problem: Problem, variant: Variant, gpu: Gpu) -> str:
    """Why biases cannot be added in the way of the variant's axis ``bias``, or "".

    added   u_i + v_j starts the accumulator of a tile, one addition per pair
    mma     a product of depth 16 adds them; tiles are held columns by rows, as matrix instructions of one warp lay them out
    wgmma   likewise, as matrix instructions across warps do
    """
    block_m, block_n, warps = (variant.int(axis) for axis in ("BLOCK_M", "BLOCK_N", "num_warps"))
    if not is_by_columns(variant):
        return ""
    if variant["stabiliser"] != "shifted":
        return "a running maximum rescales a row's sum with every tile: no part of it can wait"
    if not is_resident(problem, variant):
        return "biases start the product of all coordinates: it cannot be scaled afterwards, a block at a time"
    if variant["precision"] == "ieee":
        return "a product on the multiply-add pipe adds biases at the price of many additions"
    if variant["bias"] == "mma":
        if block_m <= block_n:
            return "warps share the columns of such a tile, and each column's biases and sums: more rows than columns are needed"
        return "a matrix instruction spans four warps here: bias=wgmma" if across_warps(gpu, block_n, warps) else ""
    if block_n % (16 * warps) or warps < 4:
        return "each of four warps or more must have 16 columns of the tile, or a multiple"
    if gpu.backend == "cuda" and not across_warps(gpu, block_n, warps):
        return f"{gpu.slug} has no matrix instruction that spans warps: bias=mma"
    return ""


def exp2_by_fma(variant: Variant) -> int:
    """Of every four exponentials, those that multiply-add units compute."""
    return variant.int("exp2_by_fma") if "exp2_by_fma" in variant else 0


def exp2_misfit(variant: Variant, gpu: Gpu) -> str:
    """Why so many of a tile's exponentials cannot be computed by multiply-add units, or ""."""
    by_fma = exp2_by_fma(variant)
    if by_fma and variant["stabiliser"] != "shifted":
        return "a running maximum's own instructions already outweigh its exponentials"
    if by_fma % 4 and gpu.backend != "cuda":
        return "which of four exponentials go where is said in PTX"
    return ""


def is_whole(variant: Variant) -> bool:
    """Whether the tile is the whole problem (`otgen.families.loop`)."""
    return variant.get("fusion") == "resident"


def is_described(variant: Variant) -> bool:
    """Whether streamed columns are fetched by tensor descriptor."""
    return variant.get("loads", "pointers") == "descriptor"


def loads_misfit(problem: Problem, variant: Variant, gpu: Gpu) -> str:
    """Why streamed columns cannot be fetched by tensor descriptor, or "".

    Elsewhere the compiler would turn a descriptor into pointers, which is slower than pointers in the first place; and it checks
    no alignment.
    """
    if not is_described(variant):
        return ""
    if not isinstance(gpu.arch, int) or gpu.arch < FIRST_COPY_UNIT:
        return f"{gpu.slug} has no unit that copies tiles by descriptor"
    if variant["stabiliser"] != "shifted":
        return "the loop of a running maximum reads by pointers"
    if not is_resident(problem, variant):
        return "a descriptor's tile is of all coordinates"
    if not is_packed(variant) and problem.d * BYTES[problem.dtype] % DESCRIPTOR_UNIT:
        return f"a descriptor's rows are multiples of {DESCRIPTOR_UNIT} bytes"
    return ""


def eviction_misfit(variant: Variant, gpu: Gpu) -> str:
    """Why L2 cannot be asked to keep the streamed columns longest, or ""."""
    if variant.get("eviction", "normal") == "normal":
        return ""
    if gpu.backend != "cuda":
        return "what L2 shall keep is said in PTX"
    if is_described(variant):
        return "a request by descriptor says nothing of eviction"
    if variant["num_stages"] != 1:
        return "copies ahead of their use, past the registers, say nothing of eviction"
    if not is_by_columns(variant):
        return "columns of masked tiles are read as rows are, which nobody reads again: bias=mma or wgmma"
    return ""


def sweep(n: int, m: int, variant: Variant, width: int = 0, batch: int = 1) -> Sweep:
    """A launch in which blocks of n rows (times blocks of `width` output columns) each stream all m columns, of each problem."""
    blocks = (ceil(width / variant.int("BLOCK_W")) if width else 1) * batch
    return Sweep(ceil(n / variant.int("BLOCK_M")) * blocks, ceil(m / variant.int("BLOCK_N")), m * batch)


def reuses_columns(problem: Problem, variant: Variant) -> bool:
    """Whether an output of d columns can take y's tile from the score: one block holds all coordinates and all columns."""
    return is_resident(problem, variant) and variant["BLOCK_W"] == variant["BLOCK_K"]


def torch_dtype(name: str) -> torch.dtype:
    """torch's type of a storage type."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int32": torch.int32}[name]


def points(count: int, problem: Problem) -> Spec:
    return Spec((count, problem.d), problem.dtype)


def clouds(problem: Problem, seed: int) -> dict[str, Any]:
    """Test input every family starts from: two clouds, weights with zeros, potentials of an almost solved problem.

    Returns float64 tensors that fp32 (coordinates: the problem's dtype) holds exactly, and the scalars scale, kappa and cost.
    The cost is |x − y|² and eps = 1/5 of its mean, so that scores span some ten powers of two.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    n, m, d = problem.n, problem.m, problem.d
    storage = torch_dtype(problem.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def weights(size: int) -> torch.Tensor:
        w = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
        if size > 2:
            w[size // 2] = 0.0
        return w / w.sum()

    x = (normal(n, d) / d**0.5).to(storage).double()
    y = (normal(m, d) / d**0.5 + 0.3 / d**0.5).to(storage).double()
    a, b = weights(n).float().double(), weights(m).float().double()
    cost, eps = 1.0, 0.4
    kappa = LOG2_E / eps
    scale = 2.0 * cost * kappa
    x_sq, y_sq = (x * x).sum(1), (y * y).sum(1)
    u = (0.2 * kappa * normal(n) - 0.5 * scale * x_sq).float().double()
    v = -0.5 * scale * y_sq
    v = (
        (v - torch.logsumexp((u[:, None] + v + scale * x @ y.T) * LN2 + a.log()[:, None], 0) / LN2 + 0.2 * normal(m))
        .float()
        .double()
    )
    return {"x": x, "y": y, "u": u, "v": v, "a": a, "b": b, "scale": scale, "kappa": kappa, "cost": cost, "eps": eps}


def scores(inputs: Mapping[str, Any]) -> torch.Tensor:
    """S_ij = u_i + v_j + scale·<x_i, y_j>, dense (n, m), in the inputs' precision."""
    result: torch.Tensor = inputs["u"][:, None] + inputs["v"] + inputs["scale"] * inputs["x"] @ inputs["y"].T
    return result


def plan(inputs: Mapping[str, Any]) -> torch.Tensor:
    """P_ij = a_i b_j 2^S_ij, dense (n, m); exactly zero where a weight is."""
    import torch

    weighted = scores(inputs) + (inputs["a"].log2()[:, None] + inputs["b"].log2())
    return torch.exp2(torch.where(weighted.isnan(), -torch.inf, weighted))


def score_budget(variant: Variant, inputs: Mapping[str, Any]) -> float:
    """Largest error a score may have: twice what rounding the operands to the variant's mode does, and fp32's own slack."""
    mode = str(variant["precision"])
    exact = scores(inputs)
    emulated = scores({**inputs, "x": rounded(inputs["x"], mode), "y": rounded(inputs["y"], mode)})
    size = (
        inputs["u"].abs().max()
        + inputs["v"][inputs["b"] > 0].abs().max()
        + inputs["scale"] * (inputs["x"] @ inputs["y"].T).abs().max()
    )
    return float(2.0 * (emulated - exact).abs().max() + FP32_SLACK * size)


def relative_budget(variant: Variant, inputs: Mapping[str, Any]) -> float:
    """Largest relative error of a sum of positive terms 2^S: what `score_budget` allows, and the rounding of the second product."""
    return float(2.0 ** score_budget(variant, inputs) - 1.0 + 4.0 * 2.0 ** -MODES[str(variant["precision"])].mantissa + 1e-5)
