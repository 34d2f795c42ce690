"""The table of GPUs against the datasheets it was derived from, and detection by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from otgen import gpus
from otgen.errors import OtgenError, UsageError
from otgen.gpus import GPUS, Gpu, gpu

DATASHEET_TFLOPS = {
    # slug: (fp32 without tensor cores, TF32, bf16 with fp32 accumulation), dense
    "a100": (19.5, 156, 312),
    "a10g": (35.0, 35, 70),
    "l4": (30.3, 60.5, 121),
    "l40s": (91.6, 183, 362),
    "rtx4090": (82.6, 82.6, 165.2),
    "rtx5090": (104.8, 104.8, 209.5),
    "h100": (61.8, 494.7, 989.4),  # fp32: 66.9 at 1980 MHz, the table holds the tensor-core boost of 1830 MHz
    "h200": (61.8, 494.7, 989.4),
    "b200": (70.3, 1125, 2250),
    "mi300x": (81.7, 653.7, 1307.4),  # fp32: 163.4 with packed instructions
}


@pytest.mark.parametrize("slug", GPUS)
def test_rates_reproduce_the_datasheet(slug: str) -> None:
    entry = GPUS[slug]
    cycles = entry.sms * entry.clock_mhz * 1e6 / 1e12
    derived = (2 * entry.fp32_lanes * cycles, entry.tensor_flops("tf32") * cycles, entry.tensor_flops("bf16") * cycles)
    assert derived == pytest.approx(DATASHEET_TFLOPS[slug], rel=0.02)
    assert entry.tensor_flops("fp16") == entry.tensor_flops("bf16")


def test_amd_matrix_units_multiply_fp32() -> None:
    entry = GPUS["mi300x"]
    assert entry.tensor_flops("fp32") * entry.sms * entry.clock_mhz / 1e6 == pytest.approx(163.4, rel=0.01)
    with pytest.raises(UsageError, match="unknown tensor-core operand 'fp32'"):
        GPUS["h100"].tensor_flops("fp32")


def test_every_promised_gpu_is_there() -> None:
    assert set(GPUS) == {"a100", "a10g", "l4", "l40s", "rtx4090", "rtx5090", "h100", "h200", "b200", "mi300x"}
    assert all(entry.slug == slug and not entry.approximate for slug, entry in GPUS.items())


@pytest.mark.parametrize("slug", GPUS)
def test_limits_are_consistent(slug: str) -> None:
    entry = GPUS[slug]
    assert entry.shared_per_block + entry.shared_reserved <= entry.shared_per_sm
    assert entry.threads_per_sm % entry.warp_size == 0
    assert entry.registers_per_sm % entry.register_unit == 0
    hash(entry)


def test_consumer_cards_accumulate_in_fp32_at_half_rate() -> None:
    assert GPUS["rtx4090"].half * 2 == GPUS["l40s"].half
    assert GPUS["rtx4090"].arch == GPUS["l40s"].arch


def test_unknown_names_say_what_is_known() -> None:
    assert gpu("H100") is GPUS["h100"]
    with pytest.raises(UsageError, match=r"unknown GPU 'h10'.*Did you mean 'h100'"):
        gpu("h10")


@pytest.mark.parametrize(
    ("name", "arch", "slug"),
    [
        ("NVIDIA A100-SXM4-80GB", 80, "a100"),
        ("NVIDIA A10G", 86, "a10g"),
        ("NVIDIA L4", 89, "l4"),
        ("NVIDIA L40S", 89, "l40s"),
        ("NVIDIA GeForce RTX 4090", 89, "rtx4090"),
        ("NVIDIA H100 80GB HBM3", 90, "h100"),
        ("NVIDIA H200", 90, "h200"),
        ("NVIDIA B200", 100, "b200"),
        ("AMD Instinct MI300X", "gfx942", "mi300x"),
    ],
)
def test_device_names_are_recognised(name: str, arch: int | str, slug: str) -> None:
    assert gpus._match(name, arch, GPUS[slug].sms, GPUS[slug].l2_bytes) is GPUS[slug]


def test_an_unknown_gpu_borrows_its_architecture() -> None:
    smaller = gpus._match("NVIDIA H100 PCIe", 90, 114, 50 << 20)
    assert smaller.approximate
    assert (smaller.slug, smaller.sms, smaller.half) == ("h100-pcie", 114, GPUS["h100"].half)
    laptop = gpus._match("NVIDIA GeForce RTX 4070 Laptop GPU", 89, 36, 32 << 20)
    assert (laptop.slug, laptop.arch, laptop.half) == ("rtx-4070-laptop-gpu", 89, GPUS["rtx4090"].half)
    assert gpus._match("NVIDIA RTX 6000 Ada Generation", 89, 142, 96 << 20).half == GPUS["l40s"].half
    assert gpus._match("NVIDIA B300", 103, 148, 126 << 20).arch == 103
    with pytest.raises(OtgenError, match="Tesla V100 has 70"):
        gpus._match("Tesla V100", 70, 80, 6 << 20)


def test_detect_without_a_gpu_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OtgenError, match="--gpu, one of a100"):
        gpus.detect()


def test_triton_targets() -> None:
    target = gpus.triton_target(GPUS["h100"])
    assert (target.backend, target.arch, target.warp_size) == ("cuda", 90, 32)
    target = gpus.triton_target(GPUS["mi300x"])
    assert (target.backend, target.arch, target.warp_size) == ("hip", "gfx942", 64)


@pytest.mark.gpu
def test_detect_finds_this_gpu() -> None:
    assert isinstance(gpus.detect(), Gpu)


def test_importing_the_table_imports_neither_torch_nor_triton() -> None:
    code = "import sys, otgen.gpus; assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
