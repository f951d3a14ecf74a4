"""Many commands on a few GPUs: each gets a GPU of its own, and the others wait their turn."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str
    command: tuple[str, ...]
    log: Path | None = None
    """File for what it prints; this process's own output if left out."""


def visible_gpus() -> list[str]:
    """What to set CUDA_VISIBLE_DEVICES to, for one GPU each; the GPUs that this process was given, and no others."""
    count = torch.cuda.device_count()
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[:count] or [str(i) for i in range(count)]


def run_jobs(jobs: Sequence[Job], at_once: int = 1) -> dict[str, int]:
    """Run all jobs, `at_once` to a GPU (or to the CPU where there is none); name -> exit status."""
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, got {at_once}")
    places = (visible_gpus() or [None]) * at_once
    waiting, codes = list(jobs), dict[str, int]()
    running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for place, (name, process) in list(running.items()):
                if process.poll() is not None:
                    codes[name] = process.returncode
                    del running[place]
            for place, gpu in enumerate(places):
                if waiting and place not in running:
                    job = waiting.pop(0)
                    running[place] = job.name, _start(job, gpu)
            time.sleep(0.2)
    finally:  # nothing goes on after Ctrl-C
        for _, process in running.values():
            process.kill()
            process.wait()
    return codes


def _start(job: Job, gpu: str | None) -> subprocess.Popen[bytes]:
    environment = None if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with contextlib.ExitStack() as stack:
        log = None if job.log is None else stack.enter_context(job.log.open("wb"))  # the child keeps its own handle
        return subprocess.Popen(job.command, env=environment, stdout=log, stderr=log)
