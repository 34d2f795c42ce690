"""The table of known GPUs: the limits a kernel must respect and the rates a prediction is made of.

Rates are per cycle and SM (AMD: compute unit, CU), so that a GPU that is not in the table can borrow those of its architecture.

Sources of the limits and rates shared by an architecture (`_ARCHITECTURE`):

threads, blocks, shared memory, registers
    CUDA C++ Programming Guide, "Compute Capabilities", technical specifications per compute capability. For 12.0 it says 24 blocks
    and 100 KiB, which devices report; the Blackwell tuning guide differs.
tensor memory
    PTX ISA, "Tensor Memory": 512 columns of 128 lanes of 32 bits per SM, given in powers of two from 32 on.
1 KiB of shared memory reserved per block, registers given in units of 256 per warp
    CUDA occupancy calculator, 8.0 and later.
fp32, alu, mufu, shuffle lanes
    The same guide, "Throughput of Native Arithmetic Instructions": fp32 multiply-add (64 on 8.0, 128 later), compare, min and max
    (64), exp2 (16), warp shuffle (32). Shared memory: 32 banks of 4 bytes per cycle.
tf32, half
    Derived: dense datasheet FLOP/s with fp32 accumulation ÷ SMs ÷ clock. GeForce cards and the A10G accumulate in fp32 at half the
    rate of L4 and L40S.
l2_bytes_per_cycle
    Assumed: sustained reads of 26 bytes per cycle and SM on HBM parts (4 TB/s on A100) and 16 on GDDR parts (5 TB/s on RTX 4090),
    below half of the 64-byte port; published microbenchmarks scatter by 20 %.
gfx942
    AMD CDNA 3 white paper and instruction set guide: one vector instruction per cycle and CU (each of four 16-lane SIMDs takes four
    cycles per wave64), exp2 at a quarter of the rate, 64 KiB of LDS at 128 bytes per cycle, 512 vector registers per lane in units
    of 8, at most 8 waves per SIMD; L2 reads of 2048 bytes per cycle and 38-CU die, three quarters of them assumed to be sustained.

Sources of each GPU's SMs, boost clock, L2 size and memory bandwidth
  a100     NVIDIA A100 datasheet (80 GB SXM: 2039 GB/s; TF32 156, bf16 312 TFLOP/s) and Ampere white paper
  a10g     NVIDIA A10G datasheet (600 GB/s; TF32 35, bf16 70 TFLOP/s); 80 SMs as the device reports
  l4       NVIDIA L4 datasheet (300 GB/s; bf16 121 TFLOP/s dense) and Ada white paper
  l40s     NVIDIA L40S datasheet (864 GB/s; TF32 183, bf16 362 TFLOP/s dense)
  rtx4090  Ada white paper (1008 GB/s; TF32 82.6, fp16 with fp32 accumulation 165.2 TFLOP/s dense)
  rtx5090  RTX Blackwell white paper (1792 GB/s; TF32 104.8, fp16 with fp32 accumulation 209.5 TFLOP/s dense)
  h100     Hopper white paper (SXM: 3352 GB/s; TF32 494.7, bf16 989.4 TFLOP/s dense, at the tensor-core boost of 1830 MHz)
  h200     NVIDIA H200 datasheet (4800 GB/s; otherwise as h100)
  b200     NVIDIA DGX B200 datasheet ÷ 8 (8000 GB/s; bf16 2250, TF32 1125 TFLOP/s dense); clock derived from 8192 FLOP/cycle/SM
  mi300x   AMD Instinct MI300X datasheet (304 CUs, 2100 MHz, 5300 GB/s; matrix fp32 163.4, TF32 653.7, bf16 1307.4 TFLOP/s)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from otgen.errors import OtgenError, UsageError, unknown

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU's limits (bytes, 32-bit registers, threads) and rates (per cycle and SM unless said otherwise).

    arch                 compute capability × 10, or AMD's gfx name
    clock_mhz            boost clock at which the rates are turned into time
    shared_per_block     most shared memory one block may ask for (opt-in)
    tensor_memory        columns of the tensor memory that an SM's programs share, 0 where there is none
    shared_reserved      shared memory the system takes from the SM for each resident block
    register_unit        registers are given to a warp in multiples of this many
    registers_per_thread the compiler's limit; more live values spill
    schedulers           warp instructions issued per cycle and SM
    fp32_lanes, alu_lanes, mufu_lanes, shuffle_lanes   results per cycle: multiply-add; compare, min, max, logic; exp2; warp shuffle
    tf32, half           dense tensor-core FLOP per cycle with fp32 accumulation; half covers bf16 and fp16
    matrix_fp32          the same for unrounded fp32 operands, 0 where the matrix unit has no such mode
    l2_bytes_per_cycle   sustained bytes read from L2
    dram_bandwidth       bytes per second of the whole GPU
    approximate          True when the entry was put together by `detect` for a GPU that is not in the table
    """

    slug: str
    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    sms: int
    clock_mhz: float
    l2_bytes: int
    dram_bandwidth: float
    shared_per_block: int
    shared_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int
    fp32_lanes: int
    tf32: int
    half: int
    l2_bytes_per_cycle: float
    warp_size: int = 32
    schedulers: int = 4
    shared_reserved: int = KIB
    registers_per_sm: int = 65536
    registers_per_thread: int = 255
    register_unit: int = 256
    alu_lanes: int = 64
    mufu_lanes: int = 16
    shuffle_lanes: int = 32
    shared_bytes_per_cycle: int = 128
    matrix_fp32: int = 0
    tensor_memory: int = 0
    approximate: bool = False

    def tensor_flops(self, unit: str) -> int:
        """Dense FLOP per cycle and SM of tensor-core products of `unit` operands: tf32, bf16, fp16, and fp32 where there is one.

        Raises UsageError for another unit.
        """
        rates = {"tf32": self.tf32, "bf16": self.half, "fp16": self.half}
        if self.matrix_fp32:
            rates["fp32"] = self.matrix_fp32
        if unit not in rates:
            raise unknown("tensor-core operand", unit, rates)
        return rates[unit]


_ADA = {"shared_per_block": 99 * KIB, "shared_per_sm": 100 * KIB, "threads_per_sm": 1536, "blocks_per_sm": 24, "fp32_lanes": 128}
_HOPPER = {
    "shared_per_block": 227 * KIB,
    "shared_per_sm": 228 * KIB,
    "threads_per_sm": 2048,
    "blocks_per_sm": 32,
    "fp32_lanes": 128,
}

_ARCHITECTURE: dict[int | str, dict[str, Any]] = {
    80: {
        **_HOPPER,
        "shared_per_block": 163 * KIB,
        "shared_per_sm": 164 * KIB,
        "fp32_lanes": 64,
        "tf32": 1024,
        "half": 2048,
        "l2_bytes_per_cycle": 26,
    },
    86: {**_ADA, "blocks_per_sm": 16, "tf32": 256, "half": 512, "l2_bytes_per_cycle": 16},
    89: {**_ADA, "tf32": 512, "half": 1024, "l2_bytes_per_cycle": 16},
    90: {**_HOPPER, "tf32": 2048, "half": 4096, "l2_bytes_per_cycle": 26},
    100: {**_HOPPER, "tf32": 4096, "half": 8192, "l2_bytes_per_cycle": 26, "tensor_memory": 512},
    120: {**_ADA, "tf32": 256, "half": 512, "l2_bytes_per_cycle": 16},
    "gfx942": {
        "shared_per_block": 64 * KIB,
        "shared_per_sm": 64 * KIB,
        "shared_reserved": 0,
        "threads_per_sm": 2048,
        "blocks_per_sm": 32,
        "fp32_lanes": 64,
        "tf32": 1024,
        "half": 2048,
        "l2_bytes_per_cycle": 40,
        "warp_size": 64,
        "schedulers": 1,
        "registers_per_sm": 4 * 512 * 64,
        "registers_per_thread": 512,
        "register_unit": 8 * 64,
        "matrix_fp32": 256,
    },
}


def _entry(slug: str, name: str, arch: int | str, sms: int, clock_mhz: float, l2_mib: int, dram_gbs: float, **own: Any) -> Gpu:
    backend: Literal["cuda", "hip"] = "cuda" if isinstance(arch, int) else "hip"
    shared = {**_ARCHITECTURE[arch], **own}
    return Gpu(slug, name, backend, arch, sms, clock_mhz, l2_mib * KIB * KIB, dram_gbs * 1e9, **shared)


GPUS: dict[str, Gpu] = {
    entry.slug: entry
    for entry in (
        _entry("a100", "NVIDIA A100 80GB SXM", 80, 108, 1410, 40, 2039),
        _entry("a10g", "NVIDIA A10G", 86, 80, 1710, 6, 600),
        _entry("l4", "NVIDIA L4", 89, 58, 2040, 48, 300),
        _entry("l40s", "NVIDIA L40S", 89, 142, 2520, 96, 864),
        _entry("rtx4090", "NVIDIA GeForce RTX 4090", 89, 128, 2520, 72, 1008, tf32=256, half=512),
        _entry("rtx5090", "NVIDIA GeForce RTX 5090", 120, 170, 2407, 96, 1792),
        _entry("h100", "NVIDIA H100 SXM", 90, 132, 1830, 50, 3352),
        _entry("h200", "NVIDIA H200", 90, 132, 1830, 50, 4800),
        _entry("b200", "NVIDIA B200", 100, 148, 1855, 126, 8000),
        _entry("mi300x", "AMD Instinct MI300X", "gfx942", 304, 2100, 32, 5300),
    )
}
"""Every known GPU, by slug."""


def gpu(slug: str) -> Gpu:
    """The GPU called `slug`, in either case. Raises UsageError for an unknown one."""
    entry = GPUS.get(slug.lower())
    if entry is None:
        raise unknown("GPU", slug, GPUS)
    return entry


def triton_target(gpu: Gpu) -> GPUTarget:
    """Triton's compilation target for `gpu`."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget(gpu.backend, gpu.arch, gpu.warp_size)


def detect(device: int = 0) -> Gpu:
    """The GPU that torch sees as `device`.

    A GPU that is not in the table takes the per-SM limits and rates of an entry of its architecture, with its own name, count of
    SMs and L2 size, and is marked ``approximate``. Raises OtgenError when torch sees no GPU or one of an unknown architecture,
    UsageError when there is no such device.
    """
    import torch

    if not torch.cuda.is_available():
        raise OtgenError(
            f"expected a CUDA or ROCm GPU; torch sees none; name the GPU to compile for with --gpu, one of {', '.join(GPUS)}"
        )
    count = torch.cuda.device_count()
    if not 0 <= device < count:
        raise UsageError(f"expected a device below {count}; got {device}; write for example detect(0)")
    properties: Any = torch.cuda.get_device_properties(device)
    arch: int | str = properties.major * 10 + properties.minor
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    return _match(properties.name, arch, properties.multi_processor_count, properties.L2_cache_size)


def _match(name: str, arch: int | str, sms: int, l2_bytes: int) -> Gpu:
    """The table's entry for a device of these properties, or one approximated from its architecture (see `detect`)."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    spellings = {*words, *(first + second for first, second in pairwise(words))}
    for entry in GPUS.values():
        if entry.slug in spellings and entry.arch == arch and entry.sms == sms:
            return entry
    kin = [entry for entry in GPUS.values() if _compatible(entry.arch, arch)]
    if not kin:
        known = ", ".join(dict.fromkeys(str(entry.arch) for entry in GPUS.values()))
        raise OtgenError(f"expected a GPU of architecture {known}; {name} has {arch}; otgen cannot tune for it yet")
    nearest = max(kin, key=lambda entry: (str(entry.arch), ("GeForce" in entry.name) == ("geforce" in words)))
    return replace(
        nearest,
        slug="-".join(word for word in words if word not in ("nvidia", "amd", "geforce")),
        name=name,
        arch=arch,
        sms=sms,
        l2_bytes=l2_bytes,
        dram_bandwidth=nearest.dram_bandwidth * sms / nearest.sms,
        approximate=True,
    )


def _compatible(known: int | str, arch: int | str) -> bool:
    """Whether code compiled for `known` runs on `arch`: the same gfx name, or the same major capability and no higher minor one."""
    if isinstance(known, str) or isinstance(arch, str):
        return known == arch
    return known // 10 == arch // 10 and known <= arch
