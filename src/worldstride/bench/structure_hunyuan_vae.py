"""HunyuanVideo-1.5's decoder computed in the structure that upstream's code has, for the baseline of HY-WorldPlay.

The same mathematics as `vae.VideoVAE` (specification, sections 5.4 and 6 e): activations in torch's default layout,
norms across channels that lie apart in memory, past frames put before others and edges padded in passes of their own, a
mask for attention within a frame that is written row by row in Python, latents decoded one by one, all under autocast
in half precision, which leaves what norms and activations make in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from worldstride.models.hy_worldplay.vae import VideoVAE
from worldstride.models.hy_worldplay.vae_layers import CausalConv, FrameAttention
from worldstride.models.video_codec import PAST, ChannelNorm, Memory
from worldstride.models.video_decoder import VideoDecoder


class _Norm(ChannelNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * self.gamma


class _Conv(CausalConv):
    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        past = x[:, :, :1].expand(-1, -1, PAST, -1, -1)
        if memory is not None and not memory.fresh:
            past = memory.past(self.name, x)
        frames = torch.cat([past, x], 2)
        if memory is not None:
            memory.kept[self.name] = frames[:, :, -PAST:].clone()
        return self.conv(F.pad(frames, (1, 1, 1, 1, 0, 0), mode="replicate"))

    def after(self, norm: ChannelNorm, x: Tensor, memory: Memory | None = None) -> Tensor:
        return self(F.silu(norm(x), inplace=True), memory)


class _Attention(FrameAttention):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # [B, 1, T H W, C]
        tokens, each = q.shape[2], x.shape[3] * x.shape[4]
        mask = torch.full((tokens, tokens), -torch.inf, dtype=x.dtype, device=x.device)
        for row in range(tokens):
            frame = row // each
            mask[row, frame * each : (frame + 1) * each] = 0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.proj_out(out[:, 0].mT.unflatten(2, x.shape[2:]))


_PLAIN = {ChannelNorm: _Norm, CausalConv: _Conv, FrameAttention: _Attention}


def plain(vae: VideoVAE) -> VideoVAE:
    """A copy of a VAE whose decoder has upstream's structure; its encoder is shared."""
    made = copy.copy(vae)
    made._modules = dict(vae._modules)
    made.decoder = copy.deepcopy(vae.decoder)
    for module in made.decoder.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = parameter.data.contiguous()
            setattr(module, name, parameter)
    return made


class UpstreamDecoder(VideoDecoder):
    """Decodes latent after latent, in upstream's structure."""

    def __init__(self, decoder: VideoDecoder) -> None:
        super().__init__(plain(decoder.vae) if isinstance(decoder.vae, VideoVAE) else decoder.vae, *decoder.size)

    def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `VideoDecoder.decode`."""
        frames, after = list[Tensor](), dict(state)
        half = self._weight.dtype != torch.float32
        with torch.autocast(latents.device.type, self._weight.dtype, enabled=half):
            for latent in latents.split(1, 1):
                part, after = super().decode(latent, after)
                frames.append(part)
        return torch.cat(frames, 1), after
