"""What a chunk's report says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from worldstride.attention import SparsityReport
from worldstride.context.selection import ContextPlan, Signals
from worldstride.denoising import Evaluation


@dataclass(frozen=True)
class ChunkReport:
    """What was decided for a chunk, from which signal, and what it cost."""

    index: int
    """Number of the chunk, from 0."""
    first_frame: int
    """Number of its first frame in the world."""
    frames: int
    acceleration: str
    """Name of the settings in force."""
    signals: Signals
    context: ContextPlan
    context_latents: int
    encoded_latents: int
    """How many of them were encoded for this chunk; of the others keys and values had been kept."""
    context_bytes: int
    """Bytes of the encoded context."""
    steps: int
    """Solver steps, those whose evaluation was not computed included."""
    solver: str
    steps_reason: str
    evaluations: tuple[Evaluation, ...]
    levers: tuple[str, ...]
    """Levers that saved something in this chunk."""
    flops: dict[str, float]
    """Floating-point operations of the context and of denoising; empty where the model does not tell."""
    seconds: dict[str, float]
    """Wall time of each stage: control, select, fetch, context, denoise, decode, total; a share of its batch's.

    On a GPU stages are timed there. Total is the stages' sum; where chunks are made ahead it is the time from handing
    out the chunk before to handing out this one, whatever the caller did meanwhile included. Stages then overlap with
    those of other chunks and slow each other down, so that they may add up to more."""
    batch: int
    """Chunks that were made together."""
    history_latents: int
    history_bytes: int
    kept_bytes: int
    """Bytes of keys and values that are kept for later chunks."""
    sparsity: SparsityReport | None = None
    """What block-sparse attention did; None where it was not asked for or the model knows none."""

    @property
    def frames_per_second(self) -> float:
        """Frames made in a second of wall time."""
        return self.frames / max(self.seconds["total"], 1e-9)

    def to_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {**asdict(self), "frames_per_second": self.frames_per_second}


def densities(reports: Iterable[ChunkReport]) -> dict[str, float]:
    """Mean density of the chunks' attention, and of their contexts', over the chunks that tell it."""
    found: dict[str, list[float]] = {}
    for report in reports:
        for kind, share in ({} if report.sparsity is None else report.sparsity.density).items():
            found.setdefault(kind, []).append(share)
    return {kind: sum(shares) / len(shares) for kind, shares in found.items()}
