"""What came of a chunk: what it leaves for the next one, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from worldstride.attention import SparsityReport
from worldstride.context.kept import clips
from worldstride.context.selection import bounded
from worldstride.denoising import DenoisePlan, Evaluation
from worldstride.protocol import Costed, FreezesContext

if TYPE_CHECKING:
    from worldstride.stepping import Pending


@dataclass(frozen=True, eq=False)
class Left:
    """What a chunk leaves for the next one; known before its frames are."""

    pending: Pending
    latents: Tensor
    """[new, ...]"""
    decoder: dict[str, Tensor]
    kept: tuple[Tensor, ...]
    """What the model keeps of each context latent; empty where nothing is kept."""


@dataclass(frozen=True, eq=False)
class Made:
    """What came of a pending chunk."""

    left: Left
    frames: np.ndarray
    context_latents: int
    context_bytes: int
    plan: DenoisePlan
    evaluations: tuple[Evaluation, ...]
    seconds: dict[str, float]
    batch: int
    """Chunks that were made together; the seconds are a chunk's share, of denoising by its evaluations."""
    sparsity: SparsityReport | None
    """What block-sparse attention did to the batch."""

    def acted(self) -> tuple[str, ...]:
        """Names of the levers that saved something in this chunk; what a plain bound saved is no policy's doing."""
        p, spec = self.left.pending, self.plan.sampler
        s, shape, full = p.settings, p.shape, p.session.engine.model.sampler()
        longest = min(shape.window, len(p.state.history) - shape.clean)
        bound = bounded(longest, s.window)
        whole = min(shape.memory, p.signals.candidates)
        most = bounded(whole, s.memory)
        asked = full.steps if s.steps is None else s.steps
        reused = any(e.computed and not e.attended for e in self.evaluations)
        freezes = isinstance(p.session.engine.model, FreezesContext)
        did = {
            "steps": asked < full.steps,
            "solver": s.solver is not None and spec.solver == s.solver and full.solver != s.solver,
            "window": bound < longest,
            "memory": most < whole,
            "temporal": s.temporal is not None and len(p.context.window) < bound,
            # a model's own rule may bring back fewer than it could
            "spatial": s.spatial is not None and not p.policy.revisiting and s.spatial.exploring < most,
            "kept": p.absent is not None and len(p.absent) < self.context_latents,
            "cache": any(not e.computed for e in self.evaluations),
            "adaptive": s.adaptive is not None and spec.steps < asked,
            "merged": 0 < len(p.context.memory) < p.context.filled,
            "attention": reused and not freezes,
            "frozen": reused and freezes,
            "sparsity": self.sparsity is not None and any(d < 1 for d in self.sparsity.density.values()),
        }
        return tuple(name for name, fired in did.items() if fired)

    def flops(self) -> dict[str, float]:
        """Floating-point operations of the context and of denoising; empty where the model does not tell."""
        p = self.left.pending
        model, shape, kept, total = p.session.engine.model, p.shape, p.settings.kept, self.context_latents
        if not isinstance(model, Costed):
            return {}
        encoded = total if p.absent is None else len(p.absent)
        density = {} if self.sparsity is None else self.sparsity.density
        context = model.context_flops(encoded, total * density.get("context", 1.0))
        if p.absent is not None and kept is not None and kept.sees == "itself":
            context = model.context_flops(encoded, 1)
        if p.absent is not None and kept is not None and kept.sees == "before":
            groups = clips(p.absent, total, len(p.context.window), shape.new)
            context = sum(model.context_flops(len(g), g[-1] + 1) for g in groups)
        made, branches = shape.clean + shape.new, 1 if self.plan.sampler.guidance is None else 2
        if isinstance(model, FreezesContext):
            whole = total + made
            every = model.joint_flops(whole, whole, density.get("context", 1.0))
            every += (branches - 1) * model.joint_flops(made, made, density.get("context", 1.0))
            new = model.joint_flops(shape.new, whole, density.get("chunk", 1.0))
            each = (every if e.attended else new for e in self.evaluations if e.computed)
            return {"context": context, "denoise": sum(each)}
        seen = max(0.0, density.get("chunk", 1.0) * (total + made) - made)
        each = (model.evaluation_flops(made, seen if e.attended else 0) for e in self.evaluations if e.computed)
        return {"context": context, "denoise": branches * sum(each)}
