"""Parts of networks that `torch.compile` makes faster, each network's by itself."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled copy of a function.

    Torch counts how many forms it compiles of a function, and computes plainly beyond eight, without a word. Of copies
    it counts each by itself: a network in other numbers (`models.quantised`) leaves all eight to the next.
    """
    if not isinstance(function, FunctionType):
        raise TypeError(f"only plain functions are compiled, got {type(function).__name__}")
    code, scope = function.__code__.replace(), function.__globals__
    own = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own)
