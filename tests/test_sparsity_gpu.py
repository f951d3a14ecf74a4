"""Block-sparse attention in sessions on a GPU: what was measured decides, kernels run, and nobody waits for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attending import error, normal
from worldstride import Acceleration, load
from worldstride.attention import Selection, SparseAttend, Sparsity, attend, rates
from worldstride.attention.choice import Dense
from worldstride.attention.cost import Rates
from worldstride.attention.layout import runs
from worldstride.attention.selection import everything
from worldstride.attention.sparse import attend_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = torch.device("cuda")


def test_rates_are_measured_once_and_kept(tmp_path: Path):
    dense = Dense(GPU, torch.bfloat16)
    found = rates.measured(dense, GPU, torch.bfloat16, 128, tmp_path / "attention.json")
    assert isinstance(found, Rates)
    assert found.dense > 10
    assert 0.1 < found.block < 100
    assert found.choosing > 0
    assert rates.measured(dense, GPU, torch.bfloat16, 128, tmp_path / "attention.json") == found


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_a_chunk_attends_by_a_kernel_and_without_waiting(keep: float):
    settings = Sparsity((4, 8, 4), denoise=Selection("mass", keep=keep), dense_layers=0, obey=True)
    q, k, v = (normal(2, 4, 4 * 30 * 20, 128, seed=i, dtype=torch.bfloat16).to(GPU) for i in range(3))
    past = [normal(2, 4, 8 * 30 * 20, 128, seed=i, dtype=torch.bfloat16).to(GPU) for i in (3, 4)]
    owner = SparseAttend(attend, settings, (30, 20), (4, 4))
    layer = owner.at(0, "chunk")
    first = layer.chunk(q, (past[0], past[1]), (k, v))  # compiles, and sends layouts to the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = layer.chunk(q, (past[0], past[1]), (k, v))
        fresh = owner.at(1, "chunk").chunk(q, (past[0], past[1]), (k, v))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)
    assert torch.equal(first, fresh)
    report = owner.report()
    assert report.implementation in ("gluon", "triton")
    assert report.calls == {"sparse": 3}
    if keep == 1:
        truth = attend(q.float(), torch.cat([past[0], k], 2).float(), torch.cat([past[1], v], 2).float())
        assert error(first, truth) < 1e-2
    else:
        assert report.density["chunk"] == pytest.approx(1 / 3 + 0.25 * 2 / 3, abs=0.02)


def test_a_session_on_a_gpu_is_near_full_compute_where_everything_is_kept():
    engine = load("courtyard", device="cuda", dtype=torch.bfloat16)
    session = engine.new(seed=3)
    session.step()
    plain, sparse = session.fork(), session.fork()
    whole = Sparsity((1, 8, 4), denoise=Selection("mean", keep=1.0), dense_layers=0, obey=True)
    sparse.acceleration = Acceleration("sparse", sparsity=whole)
    one, other = plain.step(), sparse.step()
    assert abs(one.frames.astype(float) - other.frames.astype(float)).mean() < 4
    assert other.report.sparsity is not None
    assert other.report.sparsity.implementation in ("gluon", "triton")
    assert other.report.sparsity.density == {"chunk": 1.0}


def test_a_session_on_a_gpu_goes_by_what_was_measured():
    engine = load("courtyard", device="cuda", dtype=torch.bfloat16)
    session = engine.new(seed=3)
    session.acceleration = Acceleration("asked", sparsity=Sparsity((1, 8, 4), denoise=Selection("mean", keep=0.25)))
    report = session.step().report.sparsity
    assert report is not None
    (decision,) = report.decisions.values()
    assert decision.milliseconds["dense"] > 0
    assert decision.milliseconds["sparse"] > 0
    assert decision.way == "dense"  # 384 x 1152: launching and choosing cost more than all of attention
    assert report.density == {"chunk": 1.0}


def test_tensors_that_lie_where_the_copy_engine_cannot_read_are_attended_to():
    layout = runs(200).to(GPU)
    given = [normal(1, 2, 200, 128, seed=i, dtype=torch.bfloat16).to(GPU) for i in range(3)]
    off = [torch.empty(t.numel() + 1, dtype=t.dtype, device=GPU)[1:].view(t.shape).copy_(t) for t in given]
    repeated = [t[:, :1].expand(1, 2, 200, 128) for t in given]
    found = everything(1, 2, layout, layout)
    truth = attend_blocks(given[0], given[1], given[2], found, layout, layout)
    assert off[0].data_ptr() % 16
    assert torch.equal(attend_blocks(off[0], off[1], off[2], found, layout, layout).out, truth.out)
    both = attend_blocks(repeated[0], repeated[1], repeated[2], found, layout, layout).out
    assert torch.equal(both[:, 0], truth.out[:, 0])
    assert torch.equal(both[:, 1], truth.out[:, 0])
