"""How long umT5's encoder is held."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_umt5 import held, write_converted, write_native
from worldstride.errors import InputError
from worldstride.models.hy_worldplay import encoder_files
from worldstride.models.hy_worldplay.wan_encoder import load_wan_encoder


@pytest.mark.parametrize("write", [write_native, write_converted])
def test_after_closing_nothing_holds_the_encoder(tmp_path: Path, write: Callable[[Path], Path]):
    with load_wan_encoder(write(tmp_path)) as encoder:
        module = weakref.ref(held(encoder))
        storages = [weakref.ref(p.untyped_storage()) for p in held(encoder).parameters()]
        assert torch.equal(encoder.encode("a")["text"], encoder.encode("a")["text"])
        assert module() is held(encoder)  # several prompts, read once
        assert all(storage() is not None for storage in storages)
    gc.collect()
    assert module() is None
    assert all(storage() is None for storage in storages)
    encoder.close()
    assert encoder.open().encode("a")["text"].shape[1] > 1  # it may be read again
    with pytest.raises(InputError, match="a text may have 512 tokens"), encoder:
        encoder.encode("ab" * 300)
    assert encoder._held is None


def test_what_refers_to_a_closed_encoder_keeps_no_memory(tmp_path: Path):
    encoder = load_wan_encoder(write_converted(tmp_path)).open()
    module = held(encoder)
    encoder.close()
    assert all(p.is_meta for p in module.parameters())


def test_a_prompt_by_itself_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read, modules = encoder_files.wan_text_encoder, list[Any]()

    def noted(*args: Any) -> tuple[Any, Any]:
        made = read(*args)
        modules.append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(encoder_files, "wan_text_encoder", noted)
    encoder = load_wan_encoder(write_converted(tmp_path))
    states = [encoder.encode("a")["text"] for _ in range(2)]
    assert torch.equal(*states)
    gc.collect()
    assert [module() for module in modules] == [None, None]
