"""HY-WorldPlay with block-sparse attention: alone, with kept context, with reused attention, and all together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import wan_tiny
from hy_golden import begin, engine, relative
from hy_variants import BACK, FORWARD, RIGHT, latents, replayed
from worldstride import Acceleration, Engine, Session
from worldstride.acceleration import AttentionReuse
from worldstride.attention import Selection, Sparsity
from worldstride.context.kept import KeptContext

WALK = (FORWARD, FORWARD, RIGHT, FORWARD, BACK, BACK)
KEPT, REUSED = KeptContext(limit=24), AttentionReuse(2)


@pytest.fixture(scope="module")
def small() -> Engine:
    """Frames of 32 x 48 pixels: 2 x 3 tokens a latent."""
    return engine()


def sparse(keep: float, context: bool = True) -> Sparsity:
    rule = Selection("mass", keep)
    return Sparsity((1, 2, 2), denoise=rule, context=rule if context else None, dense_layers=0, obey=True)


def played(session: Session, **levers: Any) -> tuple[Session, list[Any]]:
    return replayed(session, Acceleration("some", **levers), WALK)


@pytest.mark.parametrize(
    "levers", [{}, {"kept": KEPT}, {"attention": REUSED}, {"kept": KEPT, "attention": REUSED}], ids=str
)
def test_keeping_every_block_changes_nothing(small: Engine, levers: dict[str, Any]):
    plain, _ = played(begin(small), **levers)
    same, reports = played(begin(small), sparsity=sparse(1.0), **levers)
    assert relative(latents(same), latents(plain)) < 1e-4
    assert reports[-1].sparsity.calls["sparse"] > 0
    assert reports[-1].sparsity.density["chunk"] == pytest.approx(1)


@pytest.mark.parametrize("levers", [{}, {"kept": KEPT}, {"attention": REUSED}], ids=str)
def test_leaving_blocks_out_costs_less_and_is_seen(small: Engine, levers: dict[str, Any]):
    plain, full = played(begin(small), **levers)
    other, reports = played(begin(small), sparsity=sparse(0.3), **levers)
    # the first two chunks have nothing, or next to nothing, to leave out
    assert relative(latents(other)[:4], latents(plain)[:4]) < 1e-5
    assert relative(latents(other)[8:], latents(plain)[8:]) > 1e-3
    last = reports[-1].sparsity
    assert 0.3 < last.density["chunk"] < 0.7  # text and the chunk's own tokens are always attended to
    assert 0.3 < last.density["context"] < 0.8
    assert (last.bytes, last.note) == (0, "")
    for stage in ("context", "denoise"):
        assert reports[-1].flops[stage] < full[-1].flops[stage]
    assert "sparsity" in reports[-1].levers


def test_the_wan_variant_attends_sparsely_too():
    variant = wan_tiny.engine()
    plain, full = played(wan_tiny.begin(variant), kept=KEPT)
    same, _ = played(wan_tiny.begin(variant), kept=KEPT, sparsity=sparse(1.0))
    other, reports = played(wan_tiny.begin(variant), kept=KEPT, sparsity=sparse(0.3))
    assert relative(latents(same), latents(plain)) < 1e-4
    assert relative(latents(other)[8:], latents(plain)[8:]) > 1e-3
    assert 0.3 < reports[-1].sparsity.density["chunk"] < 0.7
    assert reports[-1].flops["denoise"] < full[-1].flops["denoise"]


def test_the_context_alone_may_be_left_whole(small: Engine):
    _, reports = played(begin(small), sparsity=sparse(0.3, context=False))
    assert set(reports[-1].sparsity.density) == {"chunk"}


def test_both_streams_choose_for_themselves(small: Engine, monkeypatch: pytest.MonkeyPatch):
    """The second stream sees cameras: where it chooses as the first does, something was lost on the way."""
    from worldstride.attention import sparsity

    chosen = list[torch.Tensor]()
    select = sparsity.select

    def watched(*args: Any) -> Any:
        found = select(*args)
        chosen.append(found.table())
        return found

    monkeypatch.setattr(sparsity, "select", watched)
    played(begin(small), sparsity=sparse(0.3))
    assert any(not torch.equal(*table.chunk(2)) for table in chosen)
