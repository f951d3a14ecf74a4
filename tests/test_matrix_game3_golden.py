"""The golden Matrix-Game-3.0 case: it comes out again, and every known trap of a port is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mg3_golden import GOLDEN, network
from worldstride.attention import attend
from worldstride.attention.streams import turn
from worldstride.bench import verify_matrix_game3 as verify
from worldstride.bench.verify_matrix_game3 import MatrixGame3Verifier, config_of
from worldstride.cli import main
from worldstride.errors import CheckpointError, InputError
from worldstride.models.layers import gated, merged
from worldstride.models.matrix_game3 import model, rays, retrieval, steering
from worldstride.models.matrix_game3.config import MG3Config
from worldstride.models.matrix_game3.layers import Block
from worldstride.models.matrix_game3.model import MG3Network
from worldstride.models.matrix_game3.steering import Steering, Times, Told
from worldstride.models.matrix_game3.weights import build, idle, sources

FIRST, LATER = "c0/s0/model_out", "c1/s0/model_out"


def first_wrong(file: Path = GOLDEN) -> str:
    """Name of the first tensor out of tolerance; empty where all are fine."""
    return next((c.tensor for c in MatrixGame3Verifier().replay(file) if not c.fine), "")


def test_the_golden_case_comes_out_again(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "matrix_game3", str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    assert "26 of 26 tensors within tolerance" in printed
    for name in ("all_latents", "c1/retrieved", "c2/memory_latent_idx", "c2/s2/model_out", "poses", "timesteps"):
        assert f"\n{name} " in printed


def ask_without_replacing(self: Block, x: Tensor, out: Tensor, rows: Any, seen: Any) -> tuple[Tensor, Tensor]:
    x = gated(x, self.out(merged(out)), rows[2])
    x = (1 + seen[0]) * x + seen[1]
    return x, self.words(self.norm(x))


plain_placed = Steering._placed
plain_grouped, plain_of, plain_prepared = steering.grouped, Times.of.__func__, MG3Network.prepared  # type: ignore[attr-defined]


def ask_before_the_mouse(self: Block, x: Tensor, out: Tensor, told: Told, times: Times) -> tuple[Tensor, Tensor]:
    steering = self._steering
    return steering.moved_by(x, out), steering.asking(x, told, times)


def grouped_like_a_first_chunk(of: Tensor, latents: int) -> Tensor:
    padded = torch.cat([of[:, :1].expand(-1, 12, -1), of], 1)
    return torch.stack([padded[:, 4 * i : 4 * i + 12] for i in range(latents)], 1)


def unnormed(self: Steering, x: Tensor, times: Times) -> Tensor:
    return turn(x, times.cos, times.sin)


def unturned(self: Steering, x: Tensor, times: Times) -> Tensor:
    return plain_placed(self, x, Times(torch.ones_like(times.cos), torch.zeros_like(times.sin)))


def halves(self: Steering, x: Tensor, times: Times) -> Tensor:
    """As if channels i and i + d / 2 made a pair, among those that turn."""
    wide = plain_placed(self, x, Times(torch.ones_like(times.cos), torch.zeros_like(times.sin)))
    turning = 4
    order = [0, 2, 1, 3]
    mixed = turn(wide[..., :turning][..., order], times.cos[:, : turning // 2], times.sin[:, : turning // 2])
    return torch.cat([mixed[..., order], wide[..., turning:]], -1)


def counting_on(cls: type[Times], config: MG3Config, ranks: Any, device: torch.device) -> Times:
    return plain_of(cls, config, range(len(list(ranks))), device)


def text_without_padding(self: MG3Network, states: Tensor) -> model.Text:
    words = self.prompt(states)
    return model.Text(tuple(block.words.of_text(words) for block in self._blocks()), None)


def compressed(self: MG3Network, cameras: Tensor, numbers: Tensor, *more: Any) -> model.Prepared:
    """Ranks in the sequence in place of numbers in the world."""
    return plain_prepared(self, cameras, torch.arange(len(numbers)) + numbers[-1] - len(numbers) + 1, *more)


def moments(cameras: Tensor, height: int, width: int) -> Tensor:
    directions = torch.einsum("...ij,hwj->...hwi", cameras[..., :3, :3], rays.local_rays(height, width, cameras.dtype))
    origins = cameras[..., None, None, :3, 3].expand_as(directions)
    return rays._by_token(torch.cat([torch.linalg.cross(origins, directions), directions], -1))


def corners(height: int, width: int, dtype: torch.dtype = torch.float64, device: Any = None) -> Tensor:
    v, u = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    return F.normalize(torch.stack([2 * u - 1, 2 * v - 1, torch.ones_like(u)], -1).to(device, dtype), dim=-1)


def unscaled(cameras: Tensor, unit: Tensor) -> Tensor:
    return cameras


@pytest.mark.parametrize(
    ("where", "name", "mistake", "wrong"),
    [
        (Block, "ask", ask_without_replacing, FIRST),
        (Block, "press", ask_before_the_mouse, LATER),  # before, all latents are told the same keys
        (retrieval, "SINK", 0, "c1/memory_latent_idx"),
        (model, "grouped", grouped_like_a_first_chunk, LATER),
        (Steering, "_placed", unnormed, FIRST),
        (Steering, "_placed", unturned, FIRST),
        (Steering, "_placed", halves, FIRST),
        (Times, "of", classmethod(counting_on), LATER),
        (MG3Network, "text", text_without_padding, FIRST),
        (MG3Network, "prepared", compressed, LATER),
        (rays, "told", moments, "c1/plucker"),
        (rays, "local_rays", corners, "c0/plucker"),
        (rays, "_scaled", unscaled, "c1/plucker"),
        (model, "UNTOLD_KEY", 0.0, LATER),
        (model, "UNTOLD_MOUSE", 0.0, LATER),
        (verify, "SHIFT", 4.0, "sigmas"),
        (verify, "HIGHEST", 1.0, "sigmas"),
    ],
    ids=[
        "norm replaces the stream", "keyboard after mouse",
        "sink", "actions before", "action norm", "action turn", "interleaved pairs",
        "ranks of actions", "padding of the text", "numbers of memory", "origins", "pixel centres", "scale of a window",
        "keys of memory", "mouse of memory", "shift", "first level",
    ],
)  # fmt: skip
def test_traps_are_noticed(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, mistake: Any, wrong: str):
    monkeypatch.setattr(where, name, mistake)
    assert first_wrong() == wrong


def test_levels_rounded_to_bfloat16_are_noticed(monkeypatch: pytest.MonkeyPatch):
    plain = MG3Network.velocity

    def rounded(self: MG3Network, x: Tensor, levels: Tensor, *rest: Any) -> Tensor:
        return plain(self, x, levels.bfloat16().float(), *rest)

    monkeypatch.setattr(MG3Network, "velocity", rounded)
    assert first_wrong() == FIRST


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The golden case with other contents."""
    with np.load(GOLDEN) as opened:
        arrays = {name: opened[name] for name in opened.files}
    change(arrays)
    np.savez(folder / "case.npz", **arrays)
    return folder / "case.npz"


def without_steps(arrays: dict[str, Any]) -> None:
    for i in range(3):
        del arrays[f"c0/s{i}/model_out"]


def swap(a: str, b: str) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[f"w/{a}"], arrays[f"w/{b}"] = arrays[f"w/{b}"], arrays[f"w/{a}"]

    return change


def swap_rows(name: str, parts: int) -> Callable[[dict[str, Any]], None]:
    """The first two parts of a tensor's rows in each other's place."""

    def change(arrays: dict[str, Any]) -> None:
        some = np.split(arrays[name], parts, 1 if name.endswith("modulation") else 0)
        arrays[name] = np.concatenate([some[1], some[0], *some[2:]], 1 if name.endswith("modulation") else 0)

    return change


@pytest.mark.parametrize(
    "change",
    [
        swap_rows("w/head.modulation", 2),
        swap_rows("w/blocks.0.action_model.t_qkv.weight", 3),
        swap_rows("w/blocks.0.action_model.keyboard_attn_kv.weight", 2),
        swap("blocks.1.self_attn.norm_q.weight", "blocks.1.self_attn.norm_k.weight"),
        swap("blocks.0.cam_scale_layer.weight", "blocks.0.cam_shift_layer.weight"),
        swap("c2ws_hidden_states_layer1.weight", "c2ws_hidden_states_layer2.weight"),
        swap("blocks.2.cross_attn.k.weight", "blocks.2.cross_attn.v.weight"),
    ],
    ids=["head", "mouse", "keyboard", "norms", "camera", "camera tokens", "text"],
)
def test_weights_in_another_place_are_noticed(change: Callable[[dict[str, Any]], None], tmp_path: Path):
    assert first_wrong(rewritten(tmp_path, change)) == FIRST


def test_norms_that_are_never_applied_change_nothing(tmp_path: Path):
    """Files hold them, and upstream does not use them."""

    def change(arrays: dict[str, Any]) -> None:
        for name in arrays:
            if "img_attn_" in name or "key_attn_" in name:
                arrays[name] = arrays[name] * 0

    assert first_wrong(rewritten(tmp_path, change)) == ""


def test_broken_cases_say_what_is_wrong(tmp_path: Path):
    with pytest.raises(InputError, match="cannot read the case"):
        list(MatrixGame3Verifier().replay(tmp_path / "absent.npz"))
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(InputError, match="cannot read the case"):
        list(MatrixGame3Verifier().replay(tmp_path / "text.npz"))
    with pytest.raises(InputError, match=r"is no Matrix-Game-3\.0 case"):
        list(MatrixGame3Verifier().replay(rewritten(tmp_path, lambda a: a.pop("keyboard"))))
    with pytest.raises(CheckpointError, match=r"1 \(head\.head\.bias\) missing"):
        list(MatrixGame3Verifier().replay(rewritten(tmp_path, lambda a: a.pop("w/head.head.bias"))))
    with pytest.raises(InputError, match=r"broken Matrix-Game-3\.0 case: KeyError 'image_latent'"):
        list(MatrixGame3Verifier().replay(rewritten(tmp_path, lambda a: a.pop("image_latent"))))
    with pytest.raises(InputError, match=r"broken Matrix-Game-3\.0 case: KeyError 'c0/s0/model_out'"):
        list(MatrixGame3Verifier().replay(rewritten(tmp_path, without_steps)))
    with pytest.raises(InputError, match="are replayed here, not recorded"):
        MatrixGame3Verifier().record(tmp_path / "new.npz")


def test_a_case_may_tell_its_sizes(tmp_path: Path):
    told = '{"heads": 4, "rows": 8, "turned": 4}'
    assert first_wrong(rewritten(tmp_path, lambda a: a.update(config=np.array(told)))) == ""
    assert first_wrong(rewritten(tmp_path, lambda a: a.update(config=np.array('{"heads": 2}')))) == FIRST
    with pytest.raises(InputError, match="weights of width 32 do not tell heads, rows, turned"):
        config_of({"text_embedding.0.weight": torch.zeros(32, 4), **OTHERS}, {})


OTHERS = {
    "blocks.0.ffn.0.bias": torch.zeros(8), "patch_embedding.weight": torch.zeros(32, 4, 1, 2, 2),
    "time_embedding.0.weight": torch.zeros(32, 8),
}  # fmt: skip


def test_published_names_are_all_there():
    """1356 tensors of 6 469 915 584 numbers, as the published files have."""
    config = MG3Config()
    with torch.device("meta"):
        whole = MG3Network(config)
    table = sources(config)
    assert set(table) == set(whole.state_dict())
    names = {name for source in table.values() for name in source.names} | idle(config)
    assert len(names) == 1356
    unused = len(idle(config)) * config.action_width // config.action_heads
    assert sum(p.numel() for p in whole.parameters()) + unused == 6_469_915_584


def test_one_key_stands_for_the_padding():
    """The text's keys and values with one row for all of the padding give what all rows would."""
    of, states = network(), torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    text = of.text(states)
    whole = of.text(F.pad(states, (0, 0, 0, 5)))
    assert whole.bias is None
    assert text.bias is not None
    q = torch.randn(1, 4, 7, 16, generator=torch.Generator().manual_seed(2))
    for (k, v), (every_k, every_v) in zip(text.pairs, whole.pairs, strict=True):
        assert k.shape[2] == 4
        assert torch.allclose(attend(q, k, v, bias=text.bias), attend(q, every_k, every_v), atol=1e-5)
    with pytest.raises(InputError, match=r"text states must be \[1, L, 32\], L from 1 to 8, got \[1, 9, 32\]"):
        of.text(torch.zeros(1, 9, 32))


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(CheckpointError, match=r"is no Matrix-Game-3\.0 transformer of 30 blocks"):
        build(MG3Config(), {}, "nothing")


@pytest.fixture(autouse=True)
def _no_gradients(no_gradients: None) -> None:
    """The network's own calls need none."""
