"""Dense attention: the plain path that every other way of attending is measured against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, Protocol, overload

import torch
from torch import Tensor

from worldstride.attention.backends import Backend, need_of, unmeasured
from worldstride.attention.partial import Partial
from worldstride.errors import InputError


class Attend(Protocol):
    """How tokens attend. The loop passes one to the model; the model calls nothing else.

    q [B, H, Nq, E], k and v [B, H, Nk, E] -> [B, H, Nq, E]; every query sees every key. `bias` is added to the scaled
    scores of a key, natural units, [Nk], [B, Nk] or [B, H, Nk]; minus infinity hides the key. With `lse` the
    log-sum-exp of the scores comes along.
    """

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[True]
    ) -> Partial: ...


class Attending(ABC):
    """An `Attend` that is an object: whoever inherits says once how it attends, for both kinds of result."""

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[True]
    ) -> Partial: ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: bool = False
    ) -> Tensor | Partial:
        """See `Attend`."""
        return self.attended(q, k, v, bias, lse)

    @abstractmethod
    def attended(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> Tensor | Partial:
        """What a call gives: a `Partial` with `lse`, else its output alone."""


@overload
def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[False] = False) -> Tensor: ...


@overload
def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[True]) -> Partial: ...


def attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: bool = False) -> Tensor | Partial:
    """Softmax attention, scale 1/sqrt(E), by a rule that measures nothing (`backends.UNMEASURED`).

    Torch's fused attention, except for bfloat16 on a CPU, whose fused kernel leaves the matrix units idle, and for the
    log-sum-exp, which that function does not give. Through attention with `lse` gradients are not promised.

    Args:
        q: queries [B, H, Nq, E].
        k: keys [B, H, Nk, E]; over no key at all attention is zeros.
        v: values, likewise.
        bias: added to the scaled scores of a key, natural units, [Nk], [B, Nk] or [B, H, Nk]; minus infinity hides
            the key, and where all are hidden attention is zeros.
        lse: whether to give the log-sum-exp [B, H, Nq], too.

    Raises:
        InputError: shapes do not fit, or precisions or devices differ.
    """
    check(q, k, v, bias)
    out, total = compute(unmeasured(need_of(q, bias), lse), q, k, v, bias, lse)
    return out if total is None else Partial(out, total)


def compute(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output and, with `lse`, log-sum-exp of checked inputs by a backend."""
    if not q.numel() or not k.numel():
        out = torch.zeros_like(q)
        return out, torch.full_like(q[..., 0], -torch.inf, dtype=torch.float32) if lse else None
    if bias is None:
        return backend.run(q, k, v, None, lse)
    own = by_head(bias).float()
    top = own.amax(-1, keepdim=True)[:, :, None]  # [B or 1, H or 1, 1, 1]
    hidden = top == -torch.inf
    # only differences count; without what all keys have in common, half precision keeps them
    out, total = backend.run(q, k, v, own[:, :, None] - top.masked_fill(hidden, 0), lse)
    out = out if backend.hides else out.masked_fill(hidden, 0)
    return out, None if total is None else (total + top[..., 0]).masked_fill(hidden[..., 0], -torch.inf)


def by_head(bias: Tensor) -> Tensor:
    """A key bias [Nk], [B, Nk] or [B, H, Nk] as [B or 1, H or 1, Nk]."""
    return bias[:, None] if bias.ndim == 2 else bias[(None,) * (3 - bias.ndim)]


def check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """Raise `InputError` unless the inputs of attention go together."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise InputError(f"attention needs q [B, H, Nq, E] and k, v [B, H, Nk, E], got {_shapes(q=q, k=k, v=v)}")
    if k.shape != v.shape:
        raise InputError(f"every key needs one value: k and v must have one shape, got {_shapes(k=k, v=v)}")
    if q.shape[:2] != k.shape[:2]:
        raise InputError(f"q and k must have the same batch and heads (first two sizes), got {_shapes(q=q, k=k)}")
    if q.shape[3] != k.shape[3]:
        raise InputError(f"q and k must have as many channels a head (last size), got {_shapes(q=q, k=k)}")
    if not q.dtype.is_floating_point or q.dtype != k.dtype or q.dtype != v.dtype:
        raise InputError(f"q, k and v must have one floating-point precision, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.device != k.device or q.device != v.device:
        raise InputError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if bias is None:
        return
    batch, heads, keys = k.shape[:3]
    if tuple(bias.shape) not in ((keys,), (batch, keys), (batch, heads, keys)):
        wanted = f"[{keys}], [{batch}, {keys}] or [{batch}, {heads}, {keys}]"
        raise InputError(f"bias must have one number a key, {wanted}, got {list(bias.shape)}")
    if not bias.dtype.is_floating_point or bias.device != q.device:
        raise InputError(f"bias must be floating-point on {q.device}, got {bias.dtype} on {bias.device}")


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())


@overload
def reference(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[False] = False
) -> Tensor: ...


@overload
def reference(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[True]) -> Partial: ...


def reference(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: bool = False) -> Tensor | Partial:
    """The same in float64, written out, log-sum-exp included: the truth in tests."""
    score = torch.einsum("bhqe,bhke->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    if bias is not None:
        score = score + by_head(bias).double()[..., None, :]
    out = torch.einsum("bhqk,bhke->bhqe", score.softmax(-1), v.double())
    return Partial(out, score.logsumexp(-1)) if lse else out
