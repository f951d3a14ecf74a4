"""Compile the kernels for a Hopper GPU that is not there, exactly as their launchers would, and read the machine code.

    python compiling.py forward|warp_specialised|prepare|select|streams

prints JSON, one record a kernel. Without TRITON_INTERPRET in the environment.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from worldstride.attention import kernels
from worldstride.attention.kernels import streams
from worldstride.attention.layout import boxes
from worldstride.attention.selection import Selection

TARGET = GPUTarget("cuda", 90, 32)
SHARED = 232_448
"""Bytes of shared memory that a block may take on such a GPU."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.M)
NAMES = ("HGMMA", "HMMA", "STL", "LDL", "UTMALDG", "USETMAXREG", "MUFU")


class NoGpu:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


@contextmanager
def compiled() -> Iterator[list[Any]]:
    """Within it, whatever is launched is compiled and collected, and does not run."""
    found: list[Any] = []

    def compile_only(self: JITFunction, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: found.append(self.run(*args, grid=grid, warmup=True, **kwargs))

    hopper = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=SHARED)
    kept = JITFunction.__getitem__, torch.cuda.get_device_properties
    JITFunction.__getitem__, torch.cuda.get_device_properties = compile_only, lambda *_: hopper
    driver.set_active(NoGpu())
    try:
        yield found
    finally:
        JITFunction.__getitem__, torch.cuda.get_device_properties = kept


def machine_code(kernel: Any) -> tuple[list[tuple[int, str]], str]:
    """Addresses and instructions, and what the assembler says of registers and stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        texts = []
        for what in ("-sass", "-res-usage"):
            command = [str(TOOLS / "cuobjdump"), what, file.name]
            texts.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    code = [(int(at, 16), text) for at, text in INSTRUCTION.findall(texts[0])]
    return code, texts[1]


def operation(text: str) -> str:
    """An instruction's name without its predicate and what follows the first dot."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Innermost loops in which matrices are multiplied: instructions from where a jump goes back to, to the jump."""
    jumps = [(at, re.search(r"\bBRA(?:\.\w+)* .*?(0x[0-9a-f]+)$", text)) for at, text in code]
    spans = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    # a wait that takes longer jumps out to the end of the code and from there back into its loop: that is no loop
    whole = [(a, b) for a, b in spans if not any(first < a <= last < b for first, last in spans)]
    found = {span: [text for at, text in code if span[0] <= at <= span[1]] for span in whole}
    found = {span: inside for span, inside in found.items() if any(operation(text) == "HGMMA" for text in inside)}
    return [
        inside
        for (a, b), inside in found.items()
        if not any((a, b) != (first, last) and a <= first and last <= b for first, last in found)
    ]


def exponentials(loop: list[str]) -> dict[str, int]:
    """How many exponentials stand where in a loop, by the waits for matrix products around them."""
    stage, found = "before the scores", Counter[str]()
    for text in loop:
        if "WARPGROUP.DEPBAR" in text:
            stage = "beside the values" if text.endswith("0x1") else "after the values"
        elif text.split()[0] == "MUFU.EX2" or " MUFU.EX2 " in text:
            found[stage] += 1
    return dict(found)


def report(name: str, kernel: Any) -> dict[str, Any]:
    code, usage = machine_code(kernel)
    count = Counter(operation(text) for _, text in code)
    return {
        "name": name,
        "kernel": kernel.metadata.name,
        "counts": {n: count[n] for n in NAMES},
        "stack": [int(n) for n in re.findall(r"STACK:(\d+)", usage)],
        "registers": [int(n) for n in re.findall(r"REG:(\d+)", usage)],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "loops": [exponentials(loop) for loop in loops(code)],
    }


def attention(how: str) -> Iterator[tuple[str, Callable[[], object]]]:
    layout = boxes((2, 16, 12), (2, 8, 8))
    listed = torch.zeros(1, 2, layout.blocks, layout.blocks, dtype=torch.int32)
    counts = torch.zeros(1, 2, layout.blocks, 2, dtype=torch.int32)
    for dtype, channels, biased in (
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 64, True),
        (torch.float16, 128, True),
        (torch.float16, 64, False),
    ):
        q = torch.zeros(1, 2, layout.tokens, channels, dtype=dtype)
        bias = torch.zeros(layout.tokens) if biased else None
        given = (q, q, q, listed, counts, layout.starts, layout.starts, layout.order, bias, how)
        name = f"{how}, {dtype}, {channels} channels{', bias' if biased else ''}"
        yield name, lambda given=given: kernels.attend_listed(*given)


def preparation() -> Iterator[tuple[str, Callable[[], object]]]:
    layout = boxes((2, 16, 12), (2, 8, 8))
    for dtype, channels, parts in ((torch.bfloat16, 128, 1), (torch.float16, 64, 4)):
        x = torch.zeros(1, 8, layout.tokens, channels, dtype=dtype)
        angles, weight = torch.zeros(layout.tokens, channels), torch.zeros(channels, dtype=dtype)
        means = torch.zeros(1, 8, layout.blocks, parts, channels, dtype=dtype)
        units = torch.zeros(means.shape) if parts == 1 else None
        buffers = (x.clone(), x.clone(), means, units)
        given = (x, x, weight, angles, layout.order, layout.starts, *buffers, 0, 0, True, 1e-6)
        yield f"prepare, {dtype}, {channels} channels, {parts} parts", lambda g=given: kernels.prepare_blocks(*g)


def selection() -> Iterator[tuple[str, Callable[[], object]]]:
    for rule, blocks in (
        (Selection("cosine", smooth=True, guard=0.1, neighbours=1), 120),
        (Selection("mass", mass=0.9), 500),
    ):
        layout = boxes((1, 1, blocks), (1, 1, 1))
        means = torch.zeros(1, 2, blocks, 4, 128, dtype=torch.bfloat16)
        alike = torch.zeros(1, 2, blocks)
        given = (
            means, means, alike, alike, layout.starts, layout.kept, layout.places, layout.places,
            rule.budget(layout.free), rule,
        )  # fmt: skip
        yield f"select, {rule.score}, {blocks} blocks", lambda g=given: kernels.select_blocks(*g)


def placing() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype, channels in ((torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 128)):
        x = torch.zeros(1, 2, 100, channels, dtype=dtype)
        table, matrices = (torch.zeros(100, channels // 2),) * 2, torch.zeros(1, 4, 4, 4)
        for turns in (table, None):
            yield (
                f"streams, {dtype}, {channels} channels",
                lambda x=x, t=turns, m=matrices: streams.launch(x, t, m, x, x),
            )


def main(what: str) -> list[dict[str, Any]]:
    calls = {"prepare": preparation, "select": selection, "streams": placing}.get(what) or (
        lambda: attention({"forward": "triton", "warp_specialised": "gluon"}[what])
    )
    found = []
    for name, call in calls():
        with compiled() as made:
            call()
        assert made, f"nothing was launched for {name}"
        found += [report(name, kernel) for kernel in made]
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
