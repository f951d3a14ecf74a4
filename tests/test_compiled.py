"""Parts of networks that are compiled each by itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from worldstride.models.compiled import compiled


def longer(x: Tensor, kind: str) -> Tensor:
    return x + len(kind)


def test_what_one_network_met_does_not_count_against_another(monkeypatch: pytest.MonkeyPatch):
    """Torch gives up on a function after eight forms; three networks that meet six each are all compiled."""
    compile, counted = torch.compile, list[int]()
    for _ in range(3):
        backend = CompileCounter()
        monkeypatch.setattr(torch, "compile", partial(compile, backend=backend))
        own = compiled(longer)
        for length in range(6):
            assert own(torch.zeros(2), "a" * length).tolist() == [length, length]
        counted.append(backend.frame_count)
    torch.compiler.reset()
    assert counted == [6, 6, 6]


def test_only_plain_functions_have_copies():
    with pytest.raises(TypeError, match="only plain functions are compiled, got builtin_function_or_method"):
        compiled(max)
