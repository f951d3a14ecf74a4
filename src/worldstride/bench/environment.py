"""What a measurement was made with: every result carries its hardware, versions, date and command."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from worldstride import __version__
from worldstride.engine import Engine


def environment(device: torch.device, command: str) -> dict[str, object]:
    """Command, date, versions and hardware as plain values for JSON."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": {"device": str(device), **hardware(device)},
    }


def engine_facts(engine: Engine) -> dict[str, str | bool | None]:
    """Model, weights and number format as plain values for JSON; of a path only the name, which travels."""
    path = engine.source.path
    return {**asdict(engine.source), "path": None if path is None else Path(path).name}


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {
        "worldstride": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def hardware(device: torch.device) -> dict[str, str | int]:
    """Processor, cores, threads, instruction sets, memory, and the GPU where one is used."""
    found: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count() or 1,
        "cpu_threads_used": torch.get_num_threads(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if memory := _memory():
        found["memory_bytes"] = memory
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {"gpu": facts.name, "gpu_count": torch.cuda.device_count(), "gpu_memory_bytes": facts.total_memory}
    return found


def _cpu_name() -> str:
    table = Path("/proc/cpuinfo")  # `platform` knows no model name on Linux
    if table.is_file():
        for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system answers
        return None
