"""One step of one world or of several: plan each, carry out together what fits together, in two halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from worldstride import noise as noises
from worldstride.acceleration import Acceleration
from worldstride.attention import Attend, SparseAttend, SparsityReport
from worldstride.beside import Arrival, Beside
from worldstride.context.kept import encode_kept
from worldstride.context.policy import PolicyState
from worldstride.context.selection import ContextPlan, Signals
from worldstride.control import Action
from worldstride.denoising import DenoisePlan, Denoising
from worldstride.denoising.loop import Done
from worldstride.denoising.policy import shortened
from worldstride.denoising.stopwatch import Stopwatch
from worldstride.made import Left, Made
from worldstride.protocol import (
    AttendsSparsely,
    ChunkShape,
    Conditions,
    Context,
    FillsSlots,
    Inputs,
    KeepsLatents,
    LabelsMotion,
    Led,
    Narrows,
    Recalled,
    WorldModel,
)

if TYPE_CHECKING:
    from worldstride.session import Session
    from worldstride.state import SessionState


@dataclass(frozen=True, eq=False)
class Pending:
    """A chunk that is planned and not yet made."""

    session: Session
    state: SessionState
    """What the plan was made from."""
    settings: Acceleration
    shape: ChunkShape
    cameras: Tensor
    """Cameras of the chunk's frames [F, 4, 4]."""
    actions: tuple[Action, ...]
    own_intrinsics: Tensor | None
    """Intrinsics that the session goes on with; None takes the model's."""
    signals: Signals
    context: ContextPlan
    absent: tuple[int, ...] | None
    """Places in the context whose latents must be encoded; None encodes the whole context at once."""
    denoising: DenoisePlan
    policy: PolicyState
    noise: Tensor | None
    """Noise [clean + new, ...] in place of the session's own."""
    seconds: dict[str, float]
    """Wall time of planning."""
    encoded: Any = None
    """What the model made of the prompt, where it does that once for all chunks."""
    led: tuple[Led, ...] = ()
    """What led to each new latent: the model's labels, or actions."""

    @property
    def key(self) -> tuple[object, ...]:
        """Chunks with equal keys run as one batch."""
        state, plan = self.state, self.context
        own = None if self.own_intrinsics is None else tuple(self.own_intrinsics.flatten().tolist())
        counts = (len(plan.sink), len(plan.memory), len(plan.window))
        prompt = id(state.prompt) if state.prompt else None
        sees = self.settings.kept.sees if self.settings.kept is not None else "all"
        how, entries = self.denoising.batching(isinstance(self.session.engine.model, Narrows)), state.history.entries
        led = (*(entries[i].led for i in plan.rows), None, *self.led)
        if isinstance(self.session.engine.model, FillsSlots):
            past = entries[len(entries) - self.shape.clean :]
            numbers = (entries[i].index for i in plan.rows)
            led = (*led, *numbers, plan.slots, *(action for e in past for action in e.shown.actions))
        decoder = tuple((name, tuple(t.shape)) for name, t in sorted(state.decoder.items()))
        where = (state.chunk, self.shape, counts, self.absent, sees, own, decoder, self.settings.sparsity)
        return (*where, *how, self.actions, led, prompt, id(self.session.engine))


@dataclass(frozen=True, eq=False)
class _Batch:
    """Chunks with equal keys, stacked."""

    pending: Sequence[Pending]

    @property
    def model(self) -> WorldModel:
        return self.pending[0].session.engine.model

    def attend(self) -> Attend:
        """How tokens attend in this batch; settings of all its chunks are alike in that."""
        first, engine = self.pending[0], self.pending[0].session.engine
        settings, model = first.settings.sparsity, self.model
        if settings is None or not isinstance(model, AttendsSparsely):
            return engine.attention
        plan = first.context
        segments = (len(plan.sink), len(plan.memory), len(plan.window), first.shape.clean, first.shape.new)
        return SparseAttend(engine.attention, settings, model.token_grid, segments, engine.rates, engine.layouts)

    def sparsity(self, attend: Attend) -> SparsityReport | None:
        """What block-sparse attention did, where it was asked for."""
        return attend.report() if isinstance(attend, SparseAttend) else None

    def latents(self, places: Sequence[int]) -> Tensor:
        """Latents [B, n, ...] of some places of the context."""
        model = self.model
        rows = ([p.context.rows[i] for i in places] for p in self.pending)
        banks = zip(self.pending, rows, strict=True)
        return torch.stack([p.state.history.latents(r, model.device, model.latent_shape) for p, r in banks])

    def fetch(self) -> Tensor:
        """The latents [B, n, ...] that have to be encoded."""
        absent = self.pending[0].absent
        return self.latents(range(len(self.pending[0].context.rows)) if absent is None else absent)

    def encode(
        self, latents: Tensor, inputs: tuple[Inputs, ...], attend: Attend
    ) -> tuple[Context, list[tuple[Tensor, ...]]]:
        """The context from the fetched latents, and for each chunk what is kept of them."""
        first, model = self.pending[0], self.model
        positions, kinds = first.context.tables(first.shape.clean)
        every = range(len(first.context.rows))
        cameras = torch.stack([p.state.history.cameras(p.context.rows) for p in self.pending])
        settings = first.settings.kept
        led = tuple(first.state.history.entries[i].led for i in first.context.rows)
        numbers = tuple(first.state.history.entries[i].index for i in first.context.rows)
        recalled = Recalled(
            latents, cameras, positions, kinds, led, self.intrinsics, first.encoded, numbers=numbers,
            slots=first.context.slots, inputs=inputs,
        )  # fmt: skip
        if first.absent is None or settings is None or not isinstance(model, KeepsLatents):
            # the plain loop encodes the whole context anew for every chunk; keeping parts of it is an acceleration
            return model.encode_context(recalled, None, attend), [()] * len(self.pending)
        if not isinstance(model, LabelsMotion):  # what only one kind of model heeds need not part latents
            recalled = replace(recalled, led=())
        old = [_records(p) for p in self.pending]
        kept = [[of.get(i) for of in old] for i in every]
        context, made = encode_kept(model, recalled, kept, settings.sees, first.shape.new, attend)
        records = list[tuple[Tensor, ...]]()
        for b, of in enumerate(old):
            # one tensor for what a world keeps of a chunk, which comes and goes as one: a view of all that was encoded
            # would keep that alive, and memory for a tensor a latent takes a GPU long to get
            fresh = list[Tensor]() if made is None else list(made[b])
            if made is not None and (len(old) > 1 or len(fresh) > first.shape.new):
                fresh = [one for clip in made[b].split(first.shape.new) for one in clip.clone()]
            both = {**of, **dict(zip(first.absent, fresh, strict=True))}
            records.append(tuple(both[i] for i in every))
        return context, records

    def conditions(self) -> Conditions:
        """What the chunks are conditioned on."""
        first, model = self.pending[0], self.model
        shape, cameras, clean = first.shape, [p.cameras[list(first.shape.latent_frames)] for p in self.pending], None
        past = list[Action]()
        if shape.clean:
            banks = [p.state.history for p in self.pending]
            rows = [list(range(len(h) - shape.clean, len(h))) for h in banks]
            pairs = list(zip(banks, rows, strict=True))
            clean = torch.stack([h.latents(r, model.device, model.latent_shape) for h, r in pairs])
            cameras = [torch.cat([h.cameras(r), c]) for (h, r), c in zip(pairs, cameras, strict=True)]
            entries = banks[0].entries[-shape.clean :]
            if all(len(e.shown.actions) == len(e.shown.cameras) for e in entries):
                past = [action for e in entries for action in e.shown.actions]
        return Conditions(
            first.state.chunk, torch.stack(cameras), torch.stack([p.cameras for p in self.pending]), self.intrinsics,
            first.actions, torch.arange(-shape.clean, shape.new), clean, first.state.prompt, first.encoded, first.led,
            tuple(past),
        )  # fmt: skip

    @property
    def intrinsics(self) -> Tensor:
        """Of all cameras in this batch."""
        own = self.pending[0].own_intrinsics
        return self.model.intrinsics if own is None else own

    def noise(self, draw: int) -> Tensor:
        """Noise [B, clean + new, ...]; draw 0 is what the chunks begin with."""
        first, model = self.pending[0], self.model
        size = (first.shape.clean + first.shape.new, *model.latent_shape)
        parts = [
            p.noise if draw == 0 and p.noise is not None
            else noises.normal((1, *size), p.state.noise_seed, p.state.chunk, draw)[0]
            for p in self.pending
        ]  # fmt: skip
        return torch.stack([part.to(model.device, non_blocking=True) for part in parts])


def _records(p: Pending) -> dict[int, Tensor]:
    """Place in the context -> what the session keeps of the latent there, of those that are not encoded."""
    entries, absent = p.state.history.entries, p.absent or ()
    rows = enumerate(p.context.rows)
    return {i: p.state.kept.records[entries[row].index] for i, row in rows if i not in absent}


def grouped(pending: Sequence[Pending], limit: int | None = None) -> list[list[Pending]]:
    """Chunks that can be made together, at most `limit` at once."""
    groups: dict[tuple[object, ...], list[Pending]] = {}
    for p in pending:
        groups.setdefault(p.key, []).append(p)
    size = limit or max(len(pending), 1)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


@dataclass(frozen=True, eq=False)
class Begun:
    """Chunks with equal keys whose latents the device is asked for."""

    batch: _Batch
    attend: Attend
    latents: Tensor
    """[B, new, ...]"""
    kept: Sequence[tuple[Tensor, ...]]
    context_latents: int
    context_bytes: int
    plans: Sequence[DenoisePlan]
    done: Done
    watch: Stopwatch

    def decode(self, beside: Beside) -> Decoding:
        """Ask for the frames as well, `beside` what is asked for from now on."""
        decoder, states = self.batch.model.decoder, [p.state.decoder for p in self.batch.pending]
        reading = [self.latents, *(t for state in states for t in state.values())]
        with beside.after(beside.now(), reading):
            watch = Stopwatch(self.latents.device)
            state = states[0]
            if len(states) > 1:
                state = {name: torch.cat([s[name] for s in states]) for name in state}
            frames, after = decoder.decode(self.latents, state)
            arrival = beside.send(frames)
            watch.mark()
            rows = [_row(after, i, len(states)) for i in range(len(states))]
        left = map(Left, self.batch.pending, self.latents, rows, self.kept)
        return Decoding(self, beside, tuple(left), arrival, watch)


@dataclass(frozen=True, eq=False)
class Decoding:
    """Chunks of which all is asked for."""

    begun: Begun
    beside: Beside
    left: tuple[Left, ...]
    """What each leaves for its next one."""
    frames: Arrival
    watch: Stopwatch

    def finish(self) -> list[Made]:
        """Wait for the frames, and for nothing that was asked for since."""
        begun, count, pictures = self.begun, len(self.left), self.frames.wait()
        evaluations = begun.done.evaluations()
        with self.beside.after(None):  # what it reads was there before frames were decoded
            sparsity = begun.batch.sparsity(begun.attend)
        seconds = [*begun.watch.seconds(), *self.watch.seconds()]
        share = dict(zip(("fetch", "context", "denoise", "decode"), (t / count for t in seconds), strict=True))
        computed = [sum(e.computed for e in made) for made in evaluations]
        parts = [{**share, "denoise": share["denoise"] * count * n / sum(computed)} for n in computed]
        return [
            Made(
                left, pictures[i], begun.context_latents, begun.context_bytes // count, begun.plans[i], evaluations[i],
                {**left.pending.seconds, **parts[i]}, count, sparsity,
            )
            for i, left in enumerate(self.left)
        ]  # fmt: skip


def begin(group: Sequence[Pending]) -> Begun:
    """Ask the device for the latents of chunks with equal keys; sessions are not touched."""
    batch = _Batch(group)
    model = batch.model
    attend = batch.attend()  # may have to be measured, before clocks run
    watch = Stopwatch(model.device)
    latents, noise, conditions = batch.fetch(), batch.noise(0), batch.conditions()
    watch.mark()
    inputs = model.prepare(conditions)  # before the context, whose work a transfer would wait for
    context, kept = batch.encode(latents, inputs, attend)
    watch.mark()
    plans = [p.denoising for p in group]
    run = Denoising(model, noise, inputs, context, plans, attend, lambda i: batch.noise(i + 1))
    if run.looking:
        plans = _after_look(run, group)
    committed = model.commit(run.run(), inputs[0])
    watch.mark()
    # context, inputs and blocks end here: gigabytes that decoding can use
    if isinstance(attend, SparseAttend):
        attend.let_go()
    return Begun(batch, attend, committed, kept, context.latents, context.bytes, plans, run.done(), watch)


def carry_out(group: Sequence[Pending]) -> list[Made]:
    """Make chunks with equal keys; sessions are not touched. Results are in the order of `group`."""
    return begin(group).decode(Beside()).finish()


def _row(state: dict[str, Tensor], i: int, count: int) -> dict[str, Tensor]:
    """A world's own state of the decoder; a view would keep the whole batch's alive."""
    return state if count == 1 else {name: t[i : i + 1].clone() for name, t in state.items()}


def _after_look(run: Denoising, group: Sequence[Pending]) -> list[DenoisePlan]:
    """All plans after what first evaluations say: the one time that the host waits for the device."""
    looking, plans = run.looking, [p.denoising for p in group]
    changes: list[float] = run.change().tolist()
    for i, change in zip(looking, changes, strict=True):
        plans[i] = shortened(plans[i], group[i].settings.adaptive, change)
    if not isinstance(run.model, Narrows):  # all go on as the one that needs most
        most = max(plans, key=lambda p: p.sampler.steps)
        plans = [
            p
            if p.sampler == most.sampler
            else replace(most, reason=f"change {change:.3f}, but others of the batch go on")
            for p, change in zip(plans, changes, strict=True)
        ]
    run.refine({i: plans[i] for i in looking})
    return plans
