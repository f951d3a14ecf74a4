"""Which blocks of keys a block of queries attends to.

Blocks are compared by summaries: mean queries and keys of a block, or of its parts. The choice is made per head, from
shapes known beforehand, without the host ever waiting for the device. Written out here in torch; `kernels.select` does
the same in one kernel and is tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from worldstride.attention import ops
from worldstride.attention.layout import BLOCK, Layout
from worldstride.errors import InputError, integer_from, number_in

Score = Literal["mean", "cosine", "parts", "mass"]
PARTS = 4
"""Parts of a block whose means are kept; more cost more, and with one `parts` and `mass` see no more than `mean`."""


TINY = 1e-12
"""A share of attention that one block alone exceeds."""


class Summary(NamedTuple):
    """What is known of blocks of queries or keys without looking at their tokens."""

    means: Tensor
    """Mean of each of S equal parts of every block [B, H, M, S, E], in the inputs' precision."""
    alike: Tensor | None = None
    """Mean cosine similarity of all pairs of a block's tokens, float32 [B, H, M]: 1 where all point the same way. None
    where no guard asks for it."""


class BlockList(NamedTuple):
    """Blocks of keys for each block of queries, by number. Of a row the first counts[1] entries mean anything."""

    blocks: Tensor
    """int32 [B, H, Mq, Mk]: full blocks in ascending order, then those with fewer than 128 tokens."""
    counts: Tensor
    """int32 [B, H, Mq, 2]: how many of them are full, and how many there are."""

    def before(self, which: Literal[0, 1]) -> Tensor:
        """Places of a row before `counts[which]`, bool [B, H, Mq, Mk]: of full blocks, or of all that are listed."""
        return torch.arange(self.blocks.shape[-1], device=self.counts.device) < self.counts[..., which, None]

    def numbers(self) -> Tensor:
        """Blocks as indices, int64 [B, H, Mq, Mk]; that of some block where an entry means nothing."""
        return self.blocks.long().clamp(0, self.blocks.shape[-1] - 1)

    def table(self) -> Tensor:
        """Which blocks are listed, bool [B, H, Mq, Mk]: what `listed` makes a list of."""
        there = self.before(1)
        marks = torch.zeros(there.shape, dtype=torch.int32, device=there.device)
        return marks.scatter_add_(-1, self.numbers(), there.int()) > 0


@dataclass(frozen=True)
class Selection:
    """A rule. Blocks that the layout keeps are always attended to, and no share counts them."""

    score: Score = "mean"
    """How a block of keys is scored: scaled product of means (published for HY-WorldPlay, Light Interaction eqs. 9-11);
    cosine of means (published for Matrix-Game-3); `parts`: log sum exp over products of means of parts; `mass`: the
    share of attention that products of means of parts predict, averaged over the query block's parts."""
    keep: float = 0.25
    """Share of the other blocks that is attended to, rounded down; the same number for every head and query block."""
    mass: float | None = None
    """As many blocks as are predicted to hold this share of the attention, whatever `keep` says."""
    least: int = 1
    """Fewest blocks chosen by `keep`, if there are as many."""
    smooth: bool = False
    """Take the mean key away from all keys first. A softmax does not notice; cosines do, and sums over query parts."""
    guard: float | None = None
    """Blocks of keys whose tokens are less alike than this are attended to by all, and query blocks whose tokens are
    less alike attend to all: a mean says little about them."""
    neighbours: int | None = None
    """Blocks at most so far away on the grid of tiles (sum of steps in time, height and width) come first; they count
    into `keep`. The published prefill takes 1."""

    def __post_init__(self) -> None:
        if self.score not in get_args(Score):
            raise InputError(f"selection.score must be one of {', '.join(get_args(Score))}, got {self.score!r}")
        for name, low in (("keep", 0), ("mass", 0), ("guard", -1)):
            value = getattr(self, name)
            if value is not None or name == "keep":
                number_in(f"selection.{name}", value, low, 1)
        integer_from("selection.least", self.least, 1)
        if self.neighbours is not None:
            integer_from("selection.neighbours", self.neighbours, 0)
        if self.mass is not None and self.score == "cosine":
            raise InputError("selection.mass needs scores that predict attention; cosines do not: take another score")

    def budget(self, others: int) -> int:
        """Blocks chosen of `others` that the layout does not keep; meaningless with `mass`."""
        return min(others, max(self.least, int(self.keep * others + 1e-9)))


def summarise(x: Tensor, layout: Layout, parts: int = PARTS, alike: bool = False) -> Summary:
    """Means, and with `alike` likeness, of the blocks of x [B, H, N, E], whose tokens are in block order.

    A part is an equal share of a block's tokens in block order (up to one token); one that is empty takes the block's
    mean.
    """
    sums, sizes = _part_sums(x.float(), layout, parts), layout.sizes
    count = _part_sums(torch.ones(1, 1, layout.tokens, 1, device=x.device), layout, parts)
    whole = sums.sum(3, keepdim=True) / sizes[:, None, None]
    means = torch.where(count > 0, sums / count.clamp_min(1), whole).to(x.dtype)
    if not alike:
        return Summary(means)
    return Summary(means, likeness(unit_sums(x, layout, parts), layout))


def unit_sums(x: Tensor, layout: Layout, parts: int = PARTS) -> Tensor:
    """Sums [B, H, M, parts, E] of the tokens' unit vectors, float32."""
    return _part_sums(F.normalize(x.float(), dim=-1), layout, parts)


def likeness(units: Tensor, layout: Layout) -> Tensor:
    """`Summary.alike` [B, H, M] from sums of unit vectors [B, H, M, parts, E]."""
    return units.sum(3).square().sum(-1) / layout.sizes.square()


def _part_sums(x: Tensor, layout: Layout, parts: int) -> Tensor:
    """Sums [B, H, M, parts, E] of x [B, H, N, E]."""
    owner = layout.owner
    rank = torch.arange(layout.tokens, device=x.device) - layout.starts.long()[owner]
    slot = owner * parts + rank * parts // layout.sizes.long()[owner]  # [N]
    sums = torch.zeros((*x.shape[:2], layout.blocks * parts, x.shape[3]), device=x.device)
    return sums.index_add_(2, slot, x).unflatten(2, (-1, parts))


def score(queries: Summary, keys: Summary, layout: Layout, rule: Selection) -> Tensor:
    """Scores [B, H, Mq, Mk], float32: what `choose` ranks by. `layout` is that of the keys."""
    q, k = queries.means.float(), keys.means.float()
    _fits(q, k, layout, rule)
    sizes = layout.sizes.float()
    if rule.smooth:
        k = k - (k.mean(3) * sizes[:, None]).sum(2)[:, :, None, None] / sizes.sum()
    if rule.score in ("mean", "cosine"):
        q, k = q.mean(3), k.mean(3)
        if rule.score == "cosine":
            return torch.einsum("bhqe,bhke->bhqk", F.normalize(q, dim=-1), F.normalize(k, dim=-1))
        if not rule.smooth:  # so that products are of the inputs' precision, on matrix units
            q, k = q.to(queries.means.dtype).float(), k.to(keys.means.dtype).float()
        return torch.einsum("bhqe,bhke->bhqk", q, k) * q.shape[-1] ** -0.5
    product = torch.einsum("bhqae,bhkce->bhqkac", q, k) * q.shape[-1] ** -0.5  # [B, H, Mq, Mk, S, S]
    each = product.logsumexp(-1) + (sizes / product.shape[-1]).log()[:, None]  # tokens of a part
    if rule.score == "parts":
        return each.logsumexp(-1)
    return each.softmax(-2).mean(-1)  # a row of attention for each part of the query block


def choose(
    scores: Tensor, queries: Summary, keys: Summary, query_layout: Layout, layout: Layout, rule: Selection
) -> BlockList:
    """The blocks with the best scores [B, H, Mq, Mk]; of equal ones those with smaller numbers."""
    kept = layout.kept.expand_as(scores).clone()
    near = torch.zeros_like(kept)
    if rule.guard is not None and queries.alike is not None and keys.alike is not None:
        kept |= (keys.alike < rule.guard)[:, :, None] | (queries.alike < rule.guard)[..., None]
    if rule.neighbours is not None:
        near |= neighbours(query_layout, layout, rule.neighbours)
    free = ~kept
    if rule.mass is None:
        place = torch.where(near, torch.inf, scores).masked_fill(kept, -torch.inf)
        rank = place.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        chosen = rank < rule.budget(layout.free)
    else:
        share = scores if rule.score == "mass" else _predicted(scores, layout, rule)
        wanted = rule.mass * share.sum(-1, keepdim=True) - (share * kept).sum(-1, keepdim=True)
        wanted = torch.where(kept.any(-1, keepdim=True), wanted, wanted.clamp_min(TINY))  # no list is empty
        order = share.masked_fill(kept, 0).sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        chosen = torch.zeros_like(kept).scatter(-1, order.indices, before < wanted) | near
    return listed(kept | (chosen & free), layout)


def select(queries: Summary, keys: Summary, query_layout: Layout, layout: Layout, rule: Selection) -> BlockList:
    """Blocks of keys for every block of queries; kernels do it on a GPU with Triton, and nobody waits for them."""
    if rule.guard is not None and (queries.alike is None or keys.alike is None):
        raise InputError("selection.guard needs to know how alike a block's tokens are: summarise with alike=True")
    if ops.usable("triton", queries.means) or queries.means.shape[-1] not in (64, 128):
        return choose(score(queries, keys, layout, rule), queries, keys, query_layout, layout, rule)
    _fits(queries.means, keys.means, layout, rule)
    return BlockList(
        *ops.select_blocks(
            queries.means, keys.means, queries.alike, keys.alike, layout.starts, layout.kept, query_layout.places,
            layout.places, rule.budget(layout.free), rule.score, rule.keep, rule.mass, rule.smooth, rule.guard,
            rule.neighbours,
        )
    )  # fmt: skip


def everything(batch: int, heads: int, query_layout: Layout, layout: Layout) -> BlockList:
    """Every block for every block of queries: dense attention."""
    shape = (batch, heads, query_layout.blocks, layout.blocks)
    return listed(torch.ones(shape, dtype=torch.bool, device=layout.starts.device), layout)


def neighbours(queries: Layout, keys: Layout, reach: int) -> Tensor:
    """Which blocks of keys lie at most `reach` tiles away from a block of queries, bool [Mq, Mk]."""
    steps = (queries.places[:, None] - keys.places[None]).abs().sum(-1)
    return (steps <= reach) & (keys.places[:, 0] >= 0) & (queries.places[:, :1] >= 0)


def listed(chosen: Tensor, layout: Layout) -> BlockList:
    """A list from a table of which blocks are attended to, bool [B, H, Mq, Mk]."""
    if chosen.shape[-1] != layout.blocks:
        raise InputError(f"the table has {chosen.shape[-1]} blocks of keys, the layout {layout.blocks}")
    ragged = layout.sizes < BLOCK
    key = (~chosen).int() * 2 + ragged.int()  # full ones first
    order = key.sort(dim=-1, stable=True).indices.int()
    full = (chosen & ~ragged).sum(-1)
    return BlockList(order, torch.stack([full, chosen.sum(-1)], -1).int())


def density(blocks: BlockList, query_layout: Layout, layout: Layout) -> Tensor:
    """Share of all pairs of a query and a key that is attended to, float32 [B, H]; stays on the device."""
    keys = (layout.sizes[blocks.numbers()] * blocks.before(1)).sum(-1).float()  # [B, H, Mq]
    return (keys * query_layout.sizes).sum(-1) / (query_layout.tokens * layout.tokens)


def _predicted(scores: Tensor, layout: Layout, rule: Selection) -> Tensor:
    """Predicted shares of attention; with `parts` a block's tokens are in its score already."""
    weight = scores if rule.score == "parts" else scores + layout.sizes.float().log()
    return weight.softmax(-1)


def _fits(q: Tensor, k: Tensor, layout: Layout, rule: Selection) -> None:
    if q.shape[3] != k.shape[3]:
        raise InputError(f"queries have means of {q.shape[3]} parts of a block, keys of {k.shape[3]}: take the same")
    if k.shape[2] != layout.blocks:
        raise InputError(f"keys have {k.shape[2]} blocks, their layout {layout.blocks}")
    if q.shape[:2] != k.shape[:2] or q.shape[4] != k.shape[4]:
        raise InputError(f"summaries differ in batch, heads or channels: {tuple(q.shape)} and {tuple(k.shape)}")
