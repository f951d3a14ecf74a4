"""Train the courtyard model. One GPU: `python training/courtyard/train.py`; several: `torchrun --nproc-per-node N ...`.

Flow matching on rendered walks: context frames (lightly noised, memory sometimes random or missing, late in training
partly the model's own earlier predictions) are encoded once; several target chunks at different times and noise
levels are denoised against them. Everything is rendered while training; nothing is read from disk.
"""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import tyro
from checkpoint import flat_state, load_state, part, save_state, save_weights
from data import Batch, ContextKind, Pool, context_ranks, take
from group import Group
from objective import errors, noised
from optimizer import Optimizer, average_into, rate_at
from origin import commit
from quick import Quick
from repatch import repatched
from sequence import Fetch, Layout, Stretch, draw_stretch, encode_stretch, fetched
from settings import Settings, context_kinds
from torch import Tensor

from worldstride import worlds
from worldstride.atomic import atomic_write
from worldstride.attention import attend
from worldstride.bench.results import write_json
from worldstride.models.courtyard.codec import from_levels, to_levels
from worldstride.models.courtyard.geometry import geometry
from worldstride.models.courtyard.model import CourtyardNetwork, KeysValues, parameter_count
from worldstride.models.courtyard.weights import read_network

Encode = Callable[[Batch, Tensor, Tensor], list[KeysValues]]
"""Context from a batch, its noised frames and their noise levels."""


class Trainer:
    """One process's share of a run."""

    def __init__(self, settings: Settings, group: Group) -> None:
        self.s, self.group, self.device = settings, group, group.device
        self.dtype = torch.bfloat16 if group.cuda else torch.float32
        torch.manual_seed(settings.seed)
        config = settings.model
        self.network = CourtyardNetwork(config).to(self.device)
        if settings.initial is not None:
            self._begin_with(settings.initial)
        self.averaged = CourtyardNetwork(config).to(self.device).requires_grad_(False)
        self.averaged.load_state_dict(self.network.state_dict())
        self.optimizer = Optimizer(self.network, settings.matrix_rate, settings.rate)
        self.step, self.progress, self.contexts = 0, 0.0, 0
        if settings.resume is not None:
            self._resume(settings.resume)
        # generators of the training worlds never meet those of single seeded worlds, which live on the CPU
        self.generator = torch.Generator(self.device).manual_seed(
            2**40 + 1000 * settings.seed + group.rank + 7919 * self.step
        )
        millions = parameter_count(self.network) / 1e6
        self.group.log(f"{millions:.2f} M parameters, {group.size} process(es), torch {torch.__version__}")
        compiled = settings.compile and group.cuda
        trace, self.noised, self.errors, self.fetch = worlds.trace, noised, errors, fetched
        if compiled:
            trace, self.noised, self.errors, self.fetch = (
                torch.compile(f, dynamic=False) for f in (trace, noised, errors, fetched)
            )
            if settings.compile_cache is not None and settings.compile_cache.exists():
                torch.compiler.load_cache_artifacts(lzma.decompress(settings.compile_cache.read_bytes()))
            self.network.compile_passes()
        sizes = {
            "plain": (settings.plain_pool, settings.refresh_plain),
            "courtyard": (settings.courtyard_pool, settings.refresh_courtyard),
        }
        self.pools: dict[str, Pool] = {}
        for family, (size, fresh) in sizes.items():
            frames = 24 if settings.smoke else None
            self.pools[family] = Pool(family, size, fresh, config, self.generator, trace, frames)
            self.group.wait()
            self.group.log(f"pool {family}: {size} worlds")
        self.kinds = context_kinds(config)
        # the order of kinds and families is the same in every process, so that all compile the same shapes at once
        self.order = torch.Generator().manual_seed(settings.seed + self.step)
        self.quick = Quick(config, self.device, worlds=8 if settings.smoke else 256, smoke=settings.smoke)
        self.history: list[dict[str, float]] = []
        self.losses: dict[bool, list[Tensor]] = {False: [], True: []}
        """Of every step since the last report, by whether its contexts were encoded chunk by chunk."""
        self.layout = Layout(config, settings.kept_chunks) if settings.kept_share else None

    def _begin_with(self, file: Path) -> None:
        given, mine, model = read_network(file)[0], self.network.state_dict(), self.s.model
        free = {k: getattr(model, k) for k in ("patch_height", "patch_width", "refine", "context")}
        if replace(given.config, **free) != model:
            raise ValueError(f"{file} holds {given.config}, the run is for {model}; only {list(free)} may differ")
        state = repatched(given.state_dict(), given.config, model)
        fitting = {k: v for k, v in state.items() if k in mine and v.shape == mine[k].shape}
        self.network.load_state_dict(mine | fitting)
        fresh = sorted(mine.keys() - fitting.keys())
        self.group.log(f"started from {file.name}; drawn anew: {', '.join(fresh) or 'nothing'}")

    def _resume(self, folder: Path) -> None:
        tensors, facts = load_state(folder)
        self.network.load_state_dict(part(tensors, "network"))
        self.averaged.load_state_dict(part(tensors, "average"))
        self.optimizer.load_state({k: v.to(self.device) for k, v in part(tensors, "moment").items()})
        self.step, self.progress = int(str(facts["step"])), float(str(facts["progress"]))

    def run(self) -> None:
        """Train to the end of the schedule."""
        s, begin, done_before = self.s, None, self.progress
        marks = [done_before + (1 - done_before) * (i + 1) / s.quick for i in range(s.quick)]
        saved = time.perf_counter()
        first = self.step
        if s.initial is not None and s.quick:
            self._evaluate()
        while True:
            if self.step == first + 20:  # every shape has been seen by then
                self.group.wait()
                begin = time.perf_counter()
                self.group.log("warm")
            if self.step % 20 == 0:
                elapsed = 0.0 if begin is None else (time.perf_counter() - begin) / (60 * s.minutes)
                self.progress = self.group.agree(max(done_before + elapsed * (1 - done_before), self.step / s.steps))
            self.progress = max(self.progress, self.step / s.steps)
            if self.progress >= 1:
                break
            if marks and self.progress >= marks[0]:
                marks.pop(0)
                self._evaluate()
            if self.step % s.refresh_every == s.refresh_every - 1:
                for pool in self.pools.values():
                    pool.refresh()
            facts = self.train_step(self.step - first)
            self.step += 1
            if self.step % 100 == 0 or self.step - first in (1, 4, 20):
                self._report(facts, begin, first)
            if self.group.rank == 0 and time.perf_counter() - saved > 60 * s.state_minutes:
                self._save_state()
                saved = time.perf_counter()
        self._evaluate()
        self._finish(begin, first)

    def train_step(self, since: int) -> dict[str, Tensor | float]:
        """One optimiser step; `since` counts from the start of this process."""
        s = self.s
        choice = torch.rand(3, generator=self.order)
        kind = self.kinds[since % len(self.kinds)] if since < 16 else self.kinds[int(choice[0] * len(self.kinds))]
        family = "plain" if float(choice[1]) < s.plain_share else "courtyard"
        pool, own = self.pools[family], s.own_share if self.progress > s.own_from else 0.0
        if self.progress > s.own_from - 0.1:
            for each in self.pools.values():
                each.own = each.patches.clone() if each.own is None else each.own
        keep = pool.own is not None and self.step % s.own_every == 0
        # of the first 20 steps, which pay for compilation, some meet stretches however rare they are
        share = max(s.kept_share, 0.25) if since % 4 == 3 and since < 20 else s.kept_share
        encode, kept = self._encode(kind), self.layout is not None and float(choice[2]) < share
        if self.layout is not None and kept:
            picks = torch.randperm(len(self.layout.aims), generator=self.order)[: s.kept_targets].sort().values
            places = [self.layout.aims[i] for i in picks.tolist()]
            stretch = draw_stretch(pool, self.layout, s.kept_batch, places, s.random_memory, own)
            batch, encode = stretch.batch, self._encode_stretch(self.network, stretch, self.layout, self.fetch)
        else:
            batch = pool.draw(s.batch, kind, s.targets, s.random_memory, own, s.first_only)
        sigma, predicted, target, sampled = self._predict(batch, encode, keep)
        error, jump = self.errors(s.model, predicted, target)  # [B, R] each
        loss = ((error + s.seam * jump) / sigma.clamp_min(0.1)).mean()
        loss.backward()
        self.group.average_gradients(list(self.network.parameters()))
        rate = rate_at(since, 150, self.progress, s.decay)
        norm = self.optimizer.step(rate)
        average_into(self.averaged, self.network, self.step, s.average)
        with torch.no_grad():
            if pool.own is not None and sampled is not None:
                self._keep(pool.own, batch, sampled, sigma)
        self.losses[kept].append(loss.detach())
        self.contexts += len(batch.context) * (batch.target.shape[1] if kept else 1)
        return {"loss": loss.detach(), "error": error.detach().mean(), "norm": norm, "rate": rate}

    def _encode(self, kind: ContextKind) -> Encode:
        """How a batch's context is encoded at once."""
        config, spans = self.s.model, self.s.model.spans(kind.sink + kind.memory, kind.window)

        def encode(batch: Batch, clean: Tensor, level: Tensor) -> list[KeysValues]:
            past = geometry(config, batch.context_cameras, batch.context_ranks, batch.context_kinds)
            return self.network.context(clean, past, level, attend, spans)

        return encode

    @staticmethod
    def _encode_stretch(network: CourtyardNetwork, stretch: Stretch, layout: Layout, fetch: Fetch) -> Encode:
        """How a stretch's context is encoded, chunk by chunk."""

        def encode(_batch: Batch, clean: Tensor, level: Tensor) -> list[KeysValues]:
            return encode_stretch(network, stretch, layout, clean, level, fetch)

        return encode

    def _predict(self, batch: Batch, encode: Encode, sample: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Noise context and targets, predict: noise levels [B, R], predicted and true patches [B, R, C, n, values].

        With `sample`, the last value holds frames of two evaluations, as a player gets them: the prediction is
        carried half-way to zero noise and predicted again, so what it had to invent is sharp and not an average.
        """

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, device=self.device, generator=self.generator)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, generator=self.generator, dtype=self.dtype)

        config, (b, r) = self.s.model, batch.target.shape[:2]
        level = 0.25 * uniform(b).square() * (uniform(b) < 0.7)  # context noise
        context, _ = self.noised(batch.context, normal(*batch.context.shape), level)
        clean = torch.sigmoid(1.2 * normal(b, r).float() + self.s.log_clean).clamp_max(0.95)
        sigma = 1 - torch.where(uniform(b, r) < 0.1, 0.02 * uniform(b, r), clean)
        noisy, target = self.noised(batch.target, normal(*batch.target.shape), sigma)
        written = encode(batch, context, level)
        flat = [t.flatten(0, 1) for t in (batch.target_cameras, batch.target_ranks, noisy)]
        coming = geometry(config, flat[0], flat[1], torch.zeros_like(flat[1]))
        predicted = self.network.denoise(flat[2], coming, sigma.flatten(), written, attend)
        sampled = None
        if sample:
            with torch.no_grad():
                # Euler from sigma to sigma / 2 lands in the middle between where it was and the prediction
                half = (flat[2] + predicted) / 2
                held = [(k.detach(), v.detach()) for k, v in written]
                sampled = self.network.denoise(half, coming, sigma.flatten() / 2, held, attend).unflatten(0, (b, r))
        return sigma, predicted.unflatten(0, (b, r)), target, sampled

    @staticmethod
    def _keep(own: Tensor, batch: Batch, sampled: Tensor, sigma: Tensor) -> None:
        """Samples that still know something of the truth become later contexts: drifted pasts are in distribution."""
        old = own[batch.walks[:, None], batch.target_frames]  # [B, R C, n, values]
        new = to_levels(sampled.float()).flatten(1, 2)
        keep = (sigma < 0.9).repeat_interleave(sampled.shape[2], 1)[..., None, None]
        own[batch.walks[:, None], batch.target_frames] = torch.where(keep, new, old)

    def _report(self, facts: dict[str, Tensor | float], begin: float | None, first: int) -> None:
        values = {k: float(v) for k, v in facts.items()}
        for kept, name in ((False, "mean_loss"), (True, "mean_kept_loss")):
            values[name] = float(torch.stack(self.losses[kept]).mean()) if self.losses[kept] else math.nan
            self.losses[kept].clear()
        pace = (self.step - first - 20) / (time.perf_counter() - begin) if begin else 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.group.cuda else 0.0
        self.history.append({"step": self.step, "progress": self.progress, **values})
        self.group.log(
            f"step {self.step} {100 * self.progress:.1f} % mean loss {values['mean_loss']:.5f}, "
            f"kept {values['mean_kept_loss']:.5f} mse {values['error']:.4f} "
            f"norm {values['norm']:.2f} rate {values['rate']:.3f} {pace:.2f} steps/s {peak:.1f} GiB"
        )

    def _evaluate(self) -> None:
        if self.group.rank == 0:
            scores = self.quick.score(self.averaged) | self._staleness()
            self.history.append({"step": self.step, "progress": self.progress, **scores})
            self.group.log("QUICK", {k: float(f"{v:.4g}") for k, v in scores.items()})

    @torch.no_grad()
    def _staleness(self, batches: int = 6) -> dict[str, float]:
        """Mean squared error of predictions from contexts encoded chunk by chunk, and from the same encoded at once."""
        if self.layout is None:
            return {}
        config, sums = self.s.model, dict[str, float]()
        for family, pool in self.pools.items():
            for _ in range(batches):
                places = self.layout.aims[-3:]
                made = draw_stretch(pool, self.layout, self.s.kept_batch, places, 0.0, 0.0)
                b, wanted = made.batch, made.seen[:, places]
                clean, flat = (from_levels(t).to(self.dtype) for t in (b.context, b.target.flatten(0, 1)))
                cameras = b.target_cameras.flatten(0, 1)
                ranks, kinds = context_ranks(ContextKind(config.memory, config.window), self.device)
                zero = torch.zeros(len(clean), device=self.device)
                each = take(clean, torch.arange(len(clean), device=self.device), wanted.flatten(1))
                where = take(b.context_cameras, torch.arange(len(clean), device=self.device), wanted.flatten(1))
                frames, at = ((t.unflatten(1, (len(places), -1)).flatten(0, 1)) for t in (each, where))
                past = geometry(config, at, ranks.expand(len(at), -1), kinds.expand(len(at), -1))
                whole = self.averaged.context(frames, past, zero.repeat_interleave(len(places)), attend)
                kept = encode_stretch(self.averaged, made, self.layout, clean, zero)
                coming = geometry(
                    config, cameras, b.target_ranks.flatten(0, 1), torch.zeros(cameras.shape[:2]).to(zero)
                )
                sigma = torch.full((len(flat),), 0.8, device=self.device)
                noisy = torch.lerp(
                    flat.float(), torch.randn(flat.shape, device=self.device, generator=self.generator), 0.8
                )
                for name, context in (("kept", kept), ("whole", whole)):
                    error = (self.averaged.denoise(noisy.to(self.dtype), coming, sigma, context, attend) - flat).float()
                    key = f"{family}_{name}_mse"
                    sums[key] = sums.get(key, 0.0) + float(error.square().mean()) / batches
        return sums

    def _facts(self) -> dict[str, object]:
        settings = {k: (str(v) if isinstance(v, Path) else v) for k, v in asdict(self.s).items()}
        return {"step": self.step, "progress": self.progress, "processes": self.group.size, "settings": settings}

    def _save_state(self) -> None:
        save_state(self.s.out / "state", flat_state(self.network, self.averaged, self.optimizer.state()), self._facts())
        save_weights(self.s.out / "weights.safetensors", self.averaged, self.s.model, self._facts())

    def _finish(self, begin: float | None, first: int) -> None:
        if self.group.rank:
            return
        self.group.wait()
        seconds = time.perf_counter() - (begin or self.group.born)
        name = torch.cuda.get_device_name() if self.group.cuda else "cpu"
        facts = {
            **self._facts(),
            "seconds": seconds,
            "device": name,
            "torch": torch.__version__,
            "commit": commit(),
            "contexts": self.contexts * self.group.size,
            "history": self.history,
        }
        self._save_state()
        write_json(self.s.out / "training.json", facts)
        if self.group.cuda and self.s.compile:
            artifacts = torch.compiler.save_cache_artifacts()
            if artifacts is not None:
                with atomic_write(self.s.out / "compile_cache.xz") as temporary:
                    temporary.write_bytes(lzma.compress(artifacts[0], preset=1))
        self.group.log(f"trained {self.step} steps in {seconds:.1f} s after warm-up")


def main() -> None:
    """Command line."""
    settings = tyro.cli(Settings, description=__doc__)
    group = Group()
    Trainer(settings.for_smoke() if settings.smoke else settings, group).run()
    group.leave()


if __name__ == "__main__":
    main()
