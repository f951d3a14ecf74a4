"""The two home families of worlds: the plain court, where nothing moves, and the full courtyard with its
rooms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from worldstride.errors import InputError
from worldstride.worlds.corridor import sample_corridor
from worldstride.worlds.dice import Dice
from worldstride.worlds.plain import sample_plain
from worldstride.worlds.scene import CELLS, Scene

_SLACK = 1e-3  # walls overlap by this much at corners, so that no ray slips through between two of them
_PAINTINGS_COURT, _PAINTINGS_ROOM = 6, 2
_WALL_X, _WALL_Z = (
    5,
    5 + 2 * 8,
)  # first surface identities of the courtyard's walls: after 5 floors, 8 planes an axis


def sample_courtyard(batch: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Scene:
    """`batch` full worlds: a court and 2 to 4 rooms behind doorways, up to 4 pillars, 4 crates, 14 paintings,
    2 balls, a turning panel, 1 or 2 sliding doors and a drifting sun.

    Sides are counted +x, -x, +z, -z; a side without a room is a closed wall.
    """
    dice = Dice(device, generator)
    u, b, dev = dice.uniform, batch, dice.device
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0], device=dev)
    half = 3.4 + 1.0 * u(b)
    height = 2.1 + 0.8 * u(b)
    order = dice.permutation(b, 4)  # sides in the order in which they get rooms
    count = torch.where(u(b) < 0.2, 2, torch.where(u(b) < 0.5, 3, 4))
    rank = order.argsort(1)  # [B, 4] place of each side in that order
    present = rank < count[:, None]
    sliding = present & (rank < torch.where((count > 2) & (u(b) < 0.5), 2, 1)[:, None])

    # Rooms: lateral range [low, high] within the court's side, depth outwards, a doorway somewhere in it.
    width = 4.6 + (2 * half[:, None] - 4.6) * u(b, 4)
    low = -half[:, None] + (2 * half[:, None] - width) * u(b, 4)
    high, depth = low + width, 4.2 + 2.3 * u(b, 4)
    door_half = 0.58 + 0.14 * u(b, 4)
    door = low + 1.1 + (width - 2.2) * u(b, 4)
    door_height = torch.minimum(1.75 + 0.25 * u(b, 4), height[:, None] - 0.2)
    speed = 2 * math.pi / (80 + 80 * u(b, 4))
    gate = torch.stack(
        [door - door_half, door + door_half, door_height, sliding.float(), speed, 2 * math.pi * u(b, 4)], -1
    )
    closed = torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0, 0.0], device=dev)
    gate = torch.where(present[..., None], gate, closed)  # [B, 4, 6]

    # Planes: the axis' two court walls, the far walls of its rooms, the side walls of the other axis' rooms.
    court = torch.stack([sign * half[:, None], -_edge(half), _edge(half), height[:, None].expand(b, 4)], -1)
    far = torch.stack([sign * (half[:, None] + depth), low - _SLACK, high + _SLACK, height[:, None].expand(b, 4)], -1)
    inner, outer = sign * half[:, None], sign * (half[:, None] + depth)
    ends = torch.minimum(inner, outer) - _SLACK, torch.maximum(inner, outer) + _SLACK
    flank = torch.stack([torch.stack([at, *ends, height[:, None].expand(b, 4)], -1) for at in (low, high)], 2)
    nothing = torch.tensor([0.0, 1.0, -1.0, 0.0], device=dev)
    far = torch.where(present[..., None], far, nothing)
    flank = torch.where(present[..., None, None], flank, nothing)  # [B, side, 2, 4]
    wall_x = torch.cat([court[:, :2], far[:, :2], flank[:, 2:].flatten(1, 2)], 1)  # [B, 8, 4]
    wall_z = torch.cat([court[:, 2:], far[:, 2:], flank[:, :2].flatten(1, 2)], 1)

    # Rectangles one can stand in; an absent room is a rectangle turned inside out.
    across = torch.stack([low, high], -1)
    along = torch.stack([torch.minimum(inner, outer), torch.maximum(inner, outer)], -1)
    is_x = (sign.new_tensor([1.0, 1.0, 0.0, 0.0]) > 0)[:, None]
    rect = torch.cat([torch.where(is_x, along, across), torch.where(is_x, across, along)], -1)
    rect = torch.where(present[..., None], rect, torch.tensor([1.0, -1.0, 1.0, -1.0], device=dev) + 1e3)
    rooms = torch.cat([torch.stack([-half, half, -half, half], -1)[:, None], rect], 1)  # [B, 5, 4]

    pillar, crate, panel = _furniture(dice, half, rooms, order, present)
    ball = _balls(dice, half, rooms, order)
    painting = _paintings(dice, half, height, low, high, depth, gate, present)
    colours, frequency = _patterns(dice, b)
    sun = torch.stack([u(b) * 2 * math.pi, dice.sign(b) * (0.002 + 0.004 * u(b))], -1)
    return Scene(
        floor=rooms, wall_x=wall_x, wall_z=wall_z, gate_x=gate[:, :2], gate_z=gate[:, 2:], pillar=pillar,
        crate=crate, panel=panel, ball=ball, painting=painting, colours=colours, frequency=frequency,
        sky=dice.sky(b), sun=sun, rooms=rooms.clone(), path=torch.zeros(b, 0, 2, device=dev),
    )  # fmt: skip


def _edge(half: Tensor) -> Tensor:
    return (half + _SLACK)[:, None].expand(-1, 4)


def _furniture(
    dice: Dice, half: Tensor, rooms: Tensor, order: Tensor, present: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pillars [B, 4, 4], crates [B, 4, 5] and panels [B, 1, 7], each with room to walk around it.

    Things stand in the quadrants of the court (two pillars, a crate, the panel) and of the first four rooms
    (a pillar and a crate in the first two, a crate in the third), at least 0.75 m clear of walls and 0.8 m of
    each other.
    """
    u, b = dice.uniform, len(half)
    p_radius, p_height = 0.16 + 0.22 * u(b, 4), 1.0 + 1.3 * u(b, 4)
    c_size = torch.stack([0.22 + 0.14 * u(b, 4), 0.3 + 0.4 * u(b, 4), 0.22 + 0.14 * u(b, 4)], -1)
    c_radius = c_size[..., 0].hypot(c_size[..., 2])
    panel_half = 0.45 + 0.15 * u(b, 1)

    corner = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], device=dice.device)
    corners = corner[dice.permutation(b, 4)]  # [B, 4, 2]
    radius = torch.cat([p_radius[:, :2], c_radius[:, :1], panel_half], 1)[..., None]
    start = radius + 0.4
    in_court = corners * (start + (half[:, None, None] - 0.75 - radius - start) * u(b, 4, 2))

    def in_room(place: int, quadrant: Tensor, radius: Tensor) -> Tensor:
        side = order[:, place]
        rect = rooms.gather(1, (side + 1)[:, None, None].expand(-1, 1, 4))[:, 0]  # [B, 4]
        centre = torch.stack([rect[:, 0] + rect[:, 1], rect[:, 2] + rect[:, 3]], -1) / 2
        size = torch.stack([rect[:, 1] - rect[:, 0], rect[:, 3] - rect[:, 2]], -1) / 2
        low = radius[:, None] + 0.4
        return centre + quadrant * (low + (size - 0.75 - radius[:, None] - low).clamp_min(0) * u(b, 2))

    spots = corner[torch.stack([dice.permutation(b, 4)[:, :2] for _ in range(3)], 1)]  # [B, room, thing, 2]
    there = present.gather(1, order)  # [B, 4] is the room of that place there
    p_at = torch.stack(
        [
            in_court[:, 0],
            in_court[:, 1],
            in_room(0, spots[:, 0, 0], p_radius[:, 2]),
            in_room(1, spots[:, 1, 0], p_radius[:, 3]),
        ],
        1,
    )
    c_at = torch.stack([in_court[:, 2], *(in_room(k, spots[:, k, 1], c_radius[:, 1 + k]) for k in range(3))], 1)
    c_size = torch.where(torch.cat([there[:, :1], there[:, :3]], 1)[..., None], c_size, 0.0)
    pillar = torch.cat([p_at, p_radius[..., None], p_height[..., None]], -1)
    turn = dice.sign(b, 1) * (0.03 + 0.06 * u(b, 1))
    panel = torch.stack(
        [
            in_court[:, 3:, 0],
            in_court[:, 3:, 1],
            panel_half,
            torch.full_like(turn, 0.04),
            1.2 + 0.7 * u(b, 1),
            turn,
            6.28 * u(b, 1),
        ],
        -1,
    )
    return pillar, torch.cat([c_at, c_size], -1), panel


def _balls(dice: Dice, half: Tensor, rooms: Tensor, order: Tensor) -> Tensor:
    """Two balls [B, 2, 11]: one along an axis of the court, half of the worlds one in a room, clear of
    furniture."""
    u, b = dice.uniform, len(half)
    radius = 0.18 + 0.14 * u(b, 2)
    rect = rooms.gather(1, (order[:, 1] + 1)[:, None, None].expand(-1, 1, 4))[:, 0]
    centre = torch.stack([rect[:, 0] + rect[:, 1], rect[:, 2] + rect[:, 3]], -1) / 2
    reach = torch.stack([rect[:, 1] - rect[:, 0], rect[:, 3] - rect[:, 2]], -1) / 2 - radius[:, 1:] - 0.15
    radius = radius * torch.cat([torch.ones(b, 1, device=dice.device), (u(b, 1) < 0.5).float()], 1)
    gone = radius[:, 1] == 0
    lengthwise = u(b, 2) < 0.5  # along x
    small = torch.full((b,), 0.08, device=dice.device)
    amplitude = half - 0.5 - radius[:, 0]
    speed, phase, zero = dice.sign(b, 2) * (0.03 + 0.04 * u(b, 2)), 6.28 * u(b, 2), torch.zeros_like(small)
    first = [
        zero,
        zero,
        torch.where(lengthwise[:, 0], amplitude, small),
        torch.where(lengthwise[:, 0], small, amplitude),
    ]
    wall = dice.sign(b)  # the second ball runs along one wall of its room, where nothing stands
    x = centre[:, 0] + torch.where(lengthwise[:, 1], 0.0, wall * reach[:, 0]) + torch.where(gone, 1e3, 0.0)
    z = centre[:, 1] + torch.where(lengthwise[:, 1], wall * reach[:, 1], 0.0)
    second = [
        x,
        z,
        torch.where(lengthwise[:, 1], reach[:, 0], 0.0),
        torch.where(lengthwise[:, 1], 0.0, reach[:, 1]),
    ]
    motion = torch.stack([speed, speed, phase, phase], -1)  # [B, 2, 4]
    path = torch.cat([torch.stack([torch.stack(first, -1), torch.stack(second, -1)], 1), motion], -1)
    bounce = 0.9 * u(b, 2) * (u(b, 2) < 0.6)
    return torch.cat([path, torch.stack([radius, bounce, 0.08 + 0.1 * u(b, 2)], -1)], -1)


def _paintings(
    dice: Dice,
    half: Tensor,
    height: Tensor,
    low: Tensor,
    high: Tensor,
    depth: Tensor,
    gate: Tensor,
    present: Tensor,
) -> Tensor:
    """[B, 14, 5]: six in the court beside its doorways, two in every room (far wall and one flank)."""
    u, b, dev = dice.uniform, len(half), dice.device
    total = _PAINTINGS_COURT + 4 * _PAINTINGS_ROOM
    half_w, half_h = 0.55 + 0.3 * u(b, total), 0.42 + 0.2 * u(b, total)
    up = 0.55 + half_h + (height[:, None] - 0.7 - 2 * half_h).clamp_min(0) * u(b, total)

    n = _PAINTINGS_COURT
    side = (dice.integers(4, b, 1) + torch.arange(n, device=dev)) % 4
    g = gate.gather(1, side[..., None].expand(-1, -1, 6))
    w, edge, open_ = half_w[:, :n], half[:, None] - 0.1, g[..., 1] > g[..., 0]
    left = ((torch.where(open_, g[..., 0], 0.0) - 0.08 - w) - (w - edge)).clamp_min(0)
    right = ((edge - w) - (torch.where(open_, g[..., 1], 0.0) + 0.08 + w)).clamp_min(0)
    at = u(b, n) * (left + right)
    at_court = torch.where(at < left, at + w - edge, edge - w - (left + right - at))
    w = torch.where(left + right > 0, w, 1e-4)
    plane = torch.where(side < 2, _WALL_X + 2 * side, _WALL_Z + 2 * (side - 2))  # the court's own
    court = torch.stack([(plane + 1 - side % 2).float(), at_court, up[:, :n], w, half_h[:, :n]], -1)

    sides = torch.arange(4, device=dev)
    sign = 1 - 2 * (sides % 2)
    w = half_w[:, n:].unflatten(1, (4, 2))
    # Far walls are planes 2, 3 of their axis; a side's flanks are planes 4 + 2 (side % 2) + (0 low, 1 high)
    # of the other axis. The room lies on the inner side of each.
    far = torch.where(sides < 2, _WALL_X + 2 * (2 + sides), _WALL_Z + 2 * sides) + (sign > 0).long()
    which = dice.integers(2, b, 4)
    flank = torch.where(sides < 2, _WALL_Z, _WALL_X) + 2 * (4 + 2 * (sides % 2) + which) + which
    at_far = low + 0.1 + w[..., 0] + (high - low - 0.2 - 2 * w[..., 0]) * u(b, 4)
    at_flank = sign * (half[:, None] + 0.1 + w[..., 1] + (depth - 0.2 - 2 * w[..., 1]) * u(b, 4))
    surface = torch.stack([far.expand(b, 4), flank], -1).float()
    w = torch.where(present[..., None], w, 1e-4)
    h_up, hh = up[:, n:].unflatten(1, (4, 2)), half_h[:, n:].unflatten(1, (4, 2))
    room = torch.stack([surface, torch.stack([at_far, at_flank], -1), h_up, w, hh], -1).flatten(1, 2)
    return torch.cat([court, room], 1)


def _patterns(dice: Dice, b: int) -> tuple[Tensor, Tensor]:
    """Colours [B, 2 * 53 + cells, 3] and frequencies [B, 53, 2] of the courtyard's surfaces, in identity
    order."""
    u = dice.uniform
    zeros = lambda n: torch.zeros(b, n, 1, device=dice.device)  # noqa: E731
    floors = dice.pair(b, 5, 0.1, 0.3)
    walls = dice.pair(b, 16 * 2)  # the court's walls differ, as in the plain court
    rooms = dice.pair(b, 4 * 2).unflatten(1, (4, 2))  # each room: its end walls, its flanks
    walls = walls.unflatten(1, (2, 8, 2)).clone()  # [B, axis, plane, side, 2, 3]
    for side in range(4):
        axis, j = side // 2, side % 2
        walls[:, axis, j, j] = rooms[:, side, 0]  # the court's wall seen from the room
        walls[:, axis, 2 + j] = rooms[:, side, :1]
        walls[:, 1 - axis, 4 + 2 * j : 6 + 2 * j] = rooms[:, side, 1][:, None, None]
    pillars, crates, doors, panel, balls = (dice.pair(b, n) for n in (4, 4, 4, 1, 2))
    colours = torch.cat([floors, walls.flatten(1, 3), pillars, crates, doors, panel, balls], 1).flatten(1, 2)
    cells = u(b, (_PAINTINGS_COURT + 4 * _PAINTINGS_ROOM) * CELLS * CELLS, 3)
    check = (0.5 + 0.5 * u(b, 5, 1)).expand(b, 5, 2)
    bricks = torch.stack([0.35 + 0.65 * u(b, 32), 0.5 + 0.75 * u(b, 32)], -1)
    stripes = torch.cat([zeros(4), dice.integers(4, b, 4, 1) * 1.1], -1)
    boards = torch.stack([0.8 + 1.4 * u(b, 4), dice.integers(2, b, 4) * 2.2], -1)
    slats = torch.cat([1.5 + 1.5 * u(b, 4, 1), zeros(4)], -1)
    blade = 1.5 + 1.5 * u(b, 1, 2)
    bands = torch.cat([zeros(2), 4.0 + 3.0 * u(b, 2, 1)], -1)
    return torch.cat([colours, cells], 1), torch.cat([check, bricks, stripes, boards, slats, blade, bands], 1)


_FAMILIES = {"plain": sample_plain, "courtyard": sample_courtyard, "corridor": sample_corridor}


def scene_from_seed(family: str, seeds: Sequence[int], device: torch.device | str = "cpu") -> Scene:
    """Worlds of a family ("plain", "courtyard" or "corridor"), one for every seed.

    A world depends on its own seed only: it is the same on every machine and in any batch.
    """
    if family not in _FAMILIES:
        raise InputError(f"unknown world family {family!r}; known: {', '.join(_FAMILIES)}")
    if not seeds:
        raise InputError("scene_from_seed needs at least one seed, got none")
    worlds = [_FAMILIES[family](1, "cpu", torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return Scene.cat(worlds).to(device)
