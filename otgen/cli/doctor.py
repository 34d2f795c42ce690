"""`otgen doctor`: what is right and wrong with the databases, the tools and the GPU here."""

from __future__ import annotations

import json
import platform
import sqlite3
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from otgen import __version__
from otgen.ranking import stale
from otgen.store import default_path, shipped
from otgen.store.connect import places

if TYPE_CHECKING:
    from otgen.store.health import Health

BROKEN = 1


@click.command()
@click.option("--db", "path", metavar="PATH", type=click.Path(path_type=Path), help="Look at this database alone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def doctor(context: click.Context, path: Path | None, as_json: bool) -> None:
    """Say which database is used and why, what is wrong with each, which versions are here, and how the GPU is.

    Of a database: its file system, journal and integrity, winners that are stale, winners found with other versions than those
    here. Nothing is changed. Exit code 1 when one cannot be used; a warning alone is 0.
    """
    from otgen.store.health import examine

    tools = _tools()
    own = default_path()
    files = [path] if path else [*([own] if own.exists() else []), *shipped()]
    found = [examine(file, tools, stale) for file in files]
    looked_for = {name: str(place or "") for name, place in places().items()}
    report = {"tools": tools, "places": looked_for, "used": str(own), "databases": found, "gpus": _gpus()}
    if as_json:
        click.echo(json.dumps(report | {"databases": [_json(health) for health in found]}, indent=1))
    else:
        _print(report, found, own)
    if any(health.broken for health in found):
        context.exit(BROKEN)


def _tools() -> dict[str, str]:
    """Name → version of what decides a kernel's speed here; "" for what is not installed."""
    from otgen.toolchain import ptxas_version

    tools = {"otgen": __version__, "python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    for package in ("torch", "triton"):
        try:
            tools[package] = version(package)
        except PackageNotFoundError:
            tools[package] = ""
    try:
        tools["ptxas"] = ptxas_version() if tools["triton"] else ""
    except (OSError, ImportError):
        tools["ptxas"] = ""
    return tools


def _gpus() -> list[dict[str, Any]]:
    """Name, driver, clocks, temperature, power and memory of each GPU that NVML sees; none where it does not work."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # NVML's errors share no base but Exception: no library, no driver, no permission
        return []
    reads = {
        "name": pynvml.nvmlDeviceGetName,
        "driver": lambda handle: pynvml.nvmlSystemGetDriverVersion(),
        "sm_clock_mhz": lambda handle: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "temperature_c": lambda handle: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "power_w": lambda handle: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "memory_used_mib": lambda handle: pynvml.nvmlDeviceGetMemoryInfo(handle).used >> 20,
        "busy_percent": lambda handle: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
    }
    return [{name: _reading(read, handle) for name, read in reads.items()} for handle in handles]


def _reading(read: Any, handle: Any) -> Any:
    try:
        value = read(handle)
    except Exception:  # as above: a sensor that a GPU does not have
        return None
    return value.decode() if isinstance(value, bytes) else value


def _json(health: Health) -> dict[str, Any]:
    versions = [
        {"otgen": otgen, "triton": triton, "ptxas": ptxas, "winners": count}
        for (otgen, triton, ptxas), count in health.versions.items()
    ]
    return asdict(health) | {"path": str(health.path), "versions": versions}


def _print(report: dict[str, Any], found: list[Health], own: Path) -> None:
    click.echo("tools: " + ", ".join(f"{name} {number or 'not here'}" for name, number in report["tools"].items()))
    click.echo("your database, the first place that is set:")
    used = next(name for name, place in report["places"].items() if place)
    for name, place in report["places"].items():
        click.echo(f"  {name:15} {place or 'not set'}{'  <- used' if name == used else ''}")
    if not own.exists():
        click.echo(f"  {own} is not there yet; `otgen tune` makes it")
    click.echo("databases; yours overlays the shipped ones, row by row:")
    for health in found:
        facts = f"{health.trials} trials, {health.winners} winners, {health.measured} measured"
        state = f"{health.file_system or 'unknown'} file system, {health.journal or 'unknown'} journal, integrity "
        click.echo(f"  {health.path}: {facts}; {state}{health.integrity or 'not checked'}")
        for sentence in health.broken:
            click.echo(f"    broken: {sentence}")
        for sentence in health.warnings:
            click.echo(f"    warning: {sentence}")
    for gpu in report["gpus"]:
        click.echo("GPU: " + ", ".join(f"{name} {value}" for name, value in gpu.items() if value is not None))
    if not report["gpus"]:
        click.echo("GPU: no GPU here")
    broken, warned = sum(bool(health.broken) for health in found), sum(bool(health.warnings) for health in found)
    click.echo(f"{len(found)} databases: {broken} broken, {warned} with warnings.")
