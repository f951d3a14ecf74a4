"""All settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from data import ContextKind

from worldstride.models.courtyard.config import CourtyardConfig


@dataclass(frozen=True)
class Settings:
    """All settings of a run; the model card tells which of them the shipped weights changed."""

    out: Path = Path("out/training")
    """Where weights, state and log go."""
    model: CourtyardConfig = field(default_factory=CourtyardConfig)
    minutes: float = 14.0
    """Length of the run after compilation; the learning rate follows it."""
    steps: int = 1_000_000
    """Most optimiser steps; whichever of the two ends first."""
    batch: int = 96
    """Contexts a GPU a step."""
    targets: int = 3
    """Target chunks against one context."""
    matrix_rate: float = 0.02
    """Muon's learning rate."""
    rate: float = 2e-3
    """AdamW's learning rate."""
    decay: float = 0.6
    """Share of the run over which the rates fall linearly to 1 %."""
    average: float = 0.999
    """Decay of the averaged weights."""
    seam: float = 0.25
    """Weight of the squared jump of the error across patch borders."""
    log_clean: float = -1.0
    """Mean of the logit of the clean share, 1 - sigma; its deviation is 1.2. Few-step schedules live at high noise."""
    kept_share: float = 0.0
    """Share of steps on stretches of walks whose context is encoded chunk by chunk, as an incremental context is."""
    kept_batch: int = 40
    """Stretches a GPU in such a step."""
    kept_targets: int = 5
    """Target chunks of a stretch."""
    kept_chunks: int = 16
    """Chunks of a stretch, a multiple of 4; in long walks its runs of 4 lie apart."""
    plain_share: float = 0.55
    """Share of steps on plain static courts; the rest on courts with rooms and moving things."""
    plain_pool: int = 4096
    """Plain worlds held a GPU (64 frames each)."""
    courtyard_pool: int = 1024
    """Full worlds held a GPU (256 frames each)."""
    refresh_every: int = 12
    """Steps between renderings of `refresh_plain` and `refresh_courtyard` new worlds."""
    refresh_plain: int = 64
    refresh_courtyard: int = 16
    random_memory: float = 0.15
    """Share of contexts whose memory is random frames."""
    first_only: float = 0.5
    """Share of contexts whose memory is retrieved for the first target chunk alone, as a session does it."""
    own_from: float = 0.4
    """Point of the run from which contexts may hold the model's own predictions."""
    own_share: float = 0.5
    """Share of such contexts."""
    own_every: int = 2
    """Steps between two of which the samples are kept for later contexts; each costs one more evaluation."""
    quick: int = 3
    """Evaluations on held-out plain courts during the run."""
    state_minutes: float = 5.0
    """Minutes between saved states."""
    initial: Path | None = None
    """Weights to start from, with fresh optimiser state. Patches and refinement may differ (see `repatch`)."""
    resume: Path | None = None
    """Folder of a saved state to go on from."""
    compile_cache: Path | None = None
    """File of compiled kernels (xz) to start from; written to `out` at the end in any case."""
    seed: int = 0
    smoke: bool = False
    """A few steps of a tiny model on the CPU, to see that everything runs."""
    compile: bool = True

    def for_smoke(self) -> Settings:
        """The same run in miniature."""
        tiny = replace(self.model, size=24, width=64, depth=2, heads=1, refine=6, memory=2, window=4)
        return replace(
            self,
            model=tiny,
            minutes=5,
            steps=6 if self.steps > 100 else self.steps,
            batch=2,
            plain_pool=2,
            courtyard_pool=1,
            refresh_plain=1,
            refresh_courtyard=1,
            refresh_every=3,
            quick=1,
            compile=False,
            own_from=0.0,
            kept_batch=1,
            kept_targets=2,
            kept_chunks=4,
        )


def context_kinds(config: CourtyardConfig) -> list[ContextKind]:
    """Contexts that training mixes: full ones most often, and fewer memory or recent frames, and none."""
    full = ContextKind(config.memory, config.window, config.sink)
    half_memory, half_window = replace(full, memory=config.memory // 2), replace(full, window=config.window // 2)
    return [full] * 6 + [replace(full, memory=0), half_memory, half_window]
