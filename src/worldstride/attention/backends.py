"""Ways to compute dense attention, by name: what each can do, and how it is called.

A new one is a `Backend` in `BACKENDS`; its `run` imports what it needs when it is first called, so that importing this
module imports no compiler of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from worldstride.attention import ops, versions, written
from worldstride.attention.versions import capability

Run = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]
"""(q [B, H, Nq, E], k, v [B, H, Nk, E], bias, lse) -> output [B, H, Nq, E] and, with lse, log-sum-exp [B, H, Nq] in
float32, else None. bias is float32 [B or 1, H or 1, 1, Nk], its greatest value 0 (minus infinity where all keys are
hidden, and what comes out of that is thrown away). There is at least one query and one key."""


class Need(NamedTuple):
    """What is asked of a backend."""

    device: str
    """Type of the device."""
    capability: tuple[int, int]
    """Compute capability of a CUDA device; (0, 0) elsewhere."""
    dtype: torch.dtype
    head_dim: int
    bias: bool


@dataclass(frozen=True)
class Backend:
    """One way to compute dense attention."""

    name: str
    why_not: Callable[[Need], str | None]
    """Why it cannot do what is asked, None where it can."""
    run: Run
    lse: bool = True
    """Whether it can give the log-sum-exp."""
    plans: Literal["never", "always", "as torch chooses"] = "never"
    """Whether each new key length costs a plan, milliseconds of work on the host; lengths are then bucketed
    (`choice.Dense`). "as torch chooses": where torch chooses cuDNN."""
    timed: bool = True
    """Whether it is worth measuring on a GPU."""
    hides: bool = False
    """Whether it gives zeros itself where all keys are hidden; of others that is taken care of, by one more pass."""

    def needs_plan(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
        """Whether it builds a plan for each new key length of tensors like these; bias as in `Run`."""
        if self.plans != "as torch chooses":
            return self.plans == "always"
        mask = None if bias is None else bias.to(q.dtype)
        return torch.ops.aten._fused_sdp_choice(q, k, v, mask) == SDPBackend.CUDNN_ATTENTION.value


def need_of(q: Tensor, bias: Tensor | None) -> Need:
    """What queries and a bias ask of a backend."""
    return Need(q.device.type, capability(q.device), q.dtype, q.shape[-1], bias is not None)


_HALF = (torch.bfloat16, torch.float16)


def _lacks(need: Need, capability: tuple[int, int], dtypes: tuple[torch.dtype, ...], widest: int) -> str | None:
    """Why a fused CUDA kernel cannot do what is asked."""
    if need.device != "cuda":
        return "it needs a CUDA device"
    if need.capability < capability:
        return f"it needs compute capability {capability[0]}.{capability[1]} or higher"
    if need.dtype not in dtypes:
        return f"it needs {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}"
    if need.head_dim % 8 or need.head_dim > widest:
        return f"it needs heads of at most {widest} channels, a multiple of 8"
    return None


def _blocked_lacks(need: Need) -> str | None:
    fits = need.device == "cpu" and need.dtype == torch.bfloat16
    return None if fits else "it is for bfloat16 on a CPU"


def _cudnn_lacks(need: Need) -> str | None:
    return _lacks(need, (8, 0), _HALF, 128)


def _flash_lacks(need: Need) -> str | None:
    return "it takes no bias" if need.bias else _lacks(need, (8, 0), _HALF, 256)


def _efficient_lacks(need: Need) -> str | None:
    oldest = (8, 0) if need.dtype == torch.bfloat16 else (5, 0)
    return _lacks(need, oldest, (*_HALF, torch.float32), 1024)


def _nothing(need: Need) -> str | None:
    return None


def _own_lacks(need: Need) -> str | None:
    lack = _lacks(need, (8, 0), _HALF, 128)
    if lack is None and need.head_dim not in (64, 128):
        return "it needs heads of 64 or 128 channels"
    return lack or versions.unusable("triton", need.capability) or None


def _own(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> tuple[Tensor, Tensor | None]:
    how = "triton" if versions.unusable("gluon", capability(q.device)) else "gluon"
    extra = None if bias is None else bias[:, :, 0]
    out, total = ops.attend_all(*_dense_channels(q, k, v), extra, how)
    return out, total if lse else None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> tuple[Tensor, Tensor | None]:
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), None


def _cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> tuple[Tensor, Tensor | None]:
    q, k, v = _dense_channels(q, k, v)
    mask = None if bias is None else bias.to(q.dtype).expand(q.shape[0], -1, q.shape[2], -1)
    out, total = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, mask, lse or q.requires_grad)[:2]
    return out, total.reshape(q.shape[:3]) if lse else None  # some versions give [B, H, Nq, 1]


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> tuple[Tensor, Tensor | None]:
    q, k, v = _dense_channels(q, k, v)
    out, total = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out, total if lse else None


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> tuple[Tensor, Tensor | None]:
    q, k, v = _dense_channels(q, k, v)
    if bias is not None:  # the kernel reads 16 bytes at once, so rows must begin at multiples of that
        padded = F.pad(bias.to(q.dtype), (0, -k.shape[2] % 16))
        bias = padded.expand(*q.shape[:3], -1)[..., : k.shape[2]]
    out, total = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, lse or q.requires_grad)[:2]
    return out, total[..., : q.shape[2]] if lse else None  # padded to whole tiles of queries


def _dense_channels(*tensors: Tensor) -> list[Tensor]:
    """Fused kernels read the channels of a token side by side."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            Backend("blocked", _blocked_lacks, written.blocked, timed=False),
            Backend("worldstride", _own_lacks, _own, hides=True),
            Backend("flash", _flash_lacks, _flash),
            Backend("efficient", _efficient_lacks, _efficient),
            Backend("sdpa", _nothing, _sdpa, lse=False, plans="as torch chooses"),
            Backend("cudnn", _cudnn_lacks, _cudnn, plans="always"),
            Backend("math", _nothing, written.in_float32, timed=False),
        )
    }
)
"""Every way, by name. Of two that are as fast as each other the first is taken: those without plans stand first."""

UNMEASURED = ("blocked", "sdpa", "flash", "efficient", "math")
"""What is taken where nothing was measured: the first that can do what is asked."""


def unmeasured(need: Need, lse: bool) -> Backend:
    """What computes attention where nothing was measured."""
    for name in UNMEASURED:
        backend = BACKENDS[name]
        if (backend.lse or not lse) and backend.why_not(need) is None:
            return backend
    return BACKENDS["math"]
