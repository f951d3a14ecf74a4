"""Walks to render and to learn from: paths through a scene that come back to what they have seen.

A walk is a pose [B, n, 4] = (x, z, yaw, pitch) for every frame; frame i is meant for time i.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from worldstride.errors import InputError
from worldstride.worlds.dice import Dice
from worldstride.worlds.scene import Scene
from worldstride.worlds.space import clamp_to_free, free_rectangles, obstacles, push_out, smooth

_TAU = 2 * math.pi
_CLEARANCE = 0.4  # metres kept from the outline of things
_MARGIN = 0.35  # metres kept from walls
_TURN = 0.11  # most radians a frame while turning on the spot; sweeps while walking come on top
_RELAX = 8  # rounds of pushing and smoothing that lead a path around what it ran into
_PACE = 0.5  # the plain court's walks, slowed down for long walks
_OPEN = (
    math.pi - math.asin(0.25),
    math.pi + 2 * math.asin(0.25),
)  # phase where a sliding door is open: start, length


@torch.no_grad()
def sample_plain_walk(
    scene: Scene, n: int, generator: torch.Generator | None = None, kind: float | None = None
) -> Tensor:
    """Walks of n frames in plain courts, pose [B, n, 4]: 40 % look away and back, 30 % closed loops, 20 %
    keys, half of which retrace themselves, 10 % spins. A `kind` in [0, 1) picks one for all: < 0.4, < 0.7, <
    0.9, the rest.
    """
    _check_length(n)
    dice = Dice(scene.device, generator)
    half = scene.rooms[:, 0, 1]
    pose = _local_walk(dice, half, n, kind, 1.0)
    centre, radius = obstacles(scene)
    limit, point = (half - 0.45)[:, None, None], pose[..., :2]
    for turn in range(3):
        point = torch.minimum(torch.maximum(point, -limit), limit)
        point = push_out(point, centre, radius + _CLEARANCE)
        if turn < 2:
            point = smooth(point, 7)
    point = torch.minimum(torch.maximum(point, -limit), limit)
    return torch.cat([point, pose[..., 2:]], -1)


@torch.no_grad()
def sample_walk(scene: Scene, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Walks of n frames for any family, pose [B, n, 4], with revisits after short and long gaps.

    In a courtyard 70 % are journeys through rooms and back (a fifth of them retraced backwards in time) and
    30 % stay in the court (loops, looks, keys, spins). In a corridor one walks to and fro along it. Steps are
    at most about 0.15 m and 8 degrees, apart from short detours around things; sliding doors are waited for.
    """
    _check_length(n)
    if scene.path.shape[1] == 0 and scene.gate_x.shape[1] == 0:
        return sample_plain_walk(scene, n, generator)
    dice = Dice(scene.device, generator)
    if scene.path.shape[1]:
        pose = _follow(dice, scene, _corridor_plan(dice, scene, n), n)
    else:
        mirrored = dice.uniform(len(scene), 1) < 0.2
        journey = _follow(dice, scene, _journey_plan(dice, scene, n, mirrored), n)
        frame = torch.arange(n, device=scene.device)
        back = torch.where(frame >= n // 2, (2 * (n // 2) - 1 - frame).clamp_min(0), frame)
        journey = torch.where(mirrored[..., None], journey[:, back], journey)
        local = _local_walk(dice, scene.rooms[:, 0, 1] - 0.2, n, None, _PACE)
        edge = (scene.rooms[:, 0, 1] - _MARGIN)[:, None, None]  # keys may run far beyond the court's walls
        inside = torch.minimum(torch.maximum(local[..., :2], -edge), edge)
        local = torch.cat([inside, local[..., 2:]], -1)
        pose = torch.where(dice.uniform(len(scene), 1, 1) < 0.7, journey, local)
    rects, (centre, radius), point = free_rectangles(scene, _MARGIN), obstacles(scene), pose[..., :2]
    for turn in range(_RELAX):
        point = push_out(clamp_to_free(point, rects), centre, radius + _CLEARANCE)
        if turn + 1 < _RELAX:
            point = smooth(point, 7)
    point = clamp_to_free(point, rects)
    return torch.cat([point, pose[..., 2:]], -1)


def _check_length(n: int) -> None:
    if n < 1:
        raise InputError(f"a walk needs at least 1 frame, got n = {n}")


def _local_walk(dice: Dice, half: Tensor, n: int, kind: float | None, pace: float) -> Tensor:
    """A mixture of walks [B, n, 4] inside the square of half size [B] around the origin, before
    collisions."""
    b, u, room = len(half), dice.uniform, half[:, None]
    frame = torch.arange(n, device=half.device, dtype=torch.float32)[None]  # [1, n]
    t = pace * frame
    sign, yaw0 = dice.sign(b, 1), u(b, 1) * _TAU
    home = (u(b, 1, 2) * 2 - 1) * (room - 1.6)[..., None]  # [B, 1, 2]
    facing = torch.stack([yaw0.sin(), yaw0.cos()], -1)

    # Look away and back: the yaw swings like a triangle wave while drifting slowly to and fro.
    period = 24 + 44 * u(b, 1)
    start = torch.where(u(b, 1) < 0.5, 0.0, u(b, 1))
    swing = 1 - ((t / period + start) % 1 * 2 - 1).abs()
    look_yaw = yaw0 + sign * (1.0 + 2.4 * u(b, 1)) * swing
    look = home + facing * ((u(b, 1) * 2 - 0.7).clamp_min(0) * torch.sin(_TAU * t / (30 + 40 * u(b, 1))))[..., None]

    # Closed loops.
    angle = yaw0 + sign * _TAU * t / (26 + 22 * u(b, 1))
    reach_x, reach_z = 0.5 + 1.3 * u(b, 1), 0.5 + 1.3 * u(b, 1)
    loop = home * 0.5 + torch.stack([reach_x * angle.sin(), reach_z * angle.cos()], -1)
    loop_yaw = angle + sign * math.pi / 2 + (u(b, 1) - 0.5) * 1.6

    # Keys: controls held for six frames; half of the walks retrace themselves.
    hold = 6
    count = n // hold + 2
    turn = ((u(b, count) * 3).floor() - 1).repeat_interleave(hold, 1)[:, :n] * (0.06 + 0.07 * u(b, 1))
    move = ((u(b, count) * 3.2).floor() - 0.6).clamp(-1, 1).repeat_interleave(hold, 1)[:, :n] * 0.11
    retrace = (u(b, 1) < 0.5) & (frame >= n // 2)
    mirror = torch.where(retrace, 2 * (n // 2) - 1 - frame, frame.expand(b, n)).clamp_min(0).long()
    key_yaw = yaw0 + turn.cumsum(1)
    keys = home + (torch.stack([key_yaw.sin(), key_yaw.cos()], -1) * move[..., None]).cumsum(1)
    key_yaw, keys = key_yaw.gather(1, mirror), keys.gather(1, mirror[..., None].expand(-1, -1, 2))

    # Spins.
    spin_yaw = yaw0 + sign * (0.08 + 0.1 * u(b, 1)) * t
    spin = home + 0.25 * torch.stack([torch.sin(t * 0.1 + yaw0), torch.cos(t * 0.13 + yaw0)], -1) * u(b, 1, 1)

    k = u(b, 1) if kind is None else torch.full((b, 1), kind, device=half.device)
    yaw = torch.where(k < 0.4, look_yaw, torch.where(k < 0.7, loop_yaw, torch.where(k < 0.9, key_yaw, spin_yaw)))
    k = k[..., None]
    point = torch.where(k < 0.4, look, torch.where(k < 0.7, loop, torch.where(k < 0.9, keys, spin)))
    return torch.cat([point, yaw[..., None], _nod(dice, b, t)[..., None]], -1)


def _nod(dice: Dice, b: int, t: Tensor) -> Tensor:
    """Pitch [B, n]: level in half of the walks, else nodding by at most 0.25 radians."""
    u = dice.uniform
    return (u(b, 1) - 0.5).clamp_min(0) * 0.5 * torch.sin(_TAU * t / (16 + 30 * u(b, 1)) + u(b, 1) * _TAU)


class _Plan(NamedTuple):
    """Waypoints and what happens at each before the leg to the next one begins."""

    points: Tensor  # [B, K, 2]
    look: Tensor  # [B, K] chance of looking around
    gate: Tensor  # [B, K, 3] of the doorway ahead: slides, speed, phase


def _journey_plan(dice: Dice, scene: Scene, n: int, mirrored: Tensor) -> _Plan:
    """Trips court -> doorway -> room -> doorway -> court; rooms and places recur."""
    b, u, dev = len(scene), dice.uniform, scene.device
    half = scene.rooms[:, 0, 1]
    gates = torch.cat([scene.gate_x, scene.gate_z], 1)  # [B, 4, 6] sides +x, -x, +z, -z
    outward = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], device=dev)
    middle = (gates[..., 0] + gates[..., 1])[..., None] / 2
    doors = outward * half[:, None, None] + middle * outward.flip(-1).abs()  # [B, 4, 2]
    near, beyond = doors - 0.65 * outward, doors + 0.65 * outward
    rect = scene.rooms[:, 1:]
    size = torch.stack([rect[..., 1] - rect[..., 0], rect[..., 3] - rect[..., 2]], -1)
    centre = torch.stack([rect[..., 1] + rect[..., 0], rect[..., 3] + rect[..., 2]], -1) / 2
    spots = centre + (u(b, 4, 2) - 0.5) * (size - 1.8)  # the place where one stands in each room
    # Time runs backwards in a mirrored walk, which sliding doors would not follow.
    allowed = (gates[..., 1] > gates[..., 0]) & ~(mirrored & (gates[..., 3] > 0))
    home = (u(b, 2) * 2 - 1) * (half[:, None] - 1.2)

    points, look, ahead = [], [], []
    room = (u(b, 4) * allowed).argmax(1)
    none = torch.zeros(b, 3, device=dev)
    for _ in range(n // 90 + 2):
        place = (u(b, 2) * 2 - 1) * (half[:, None] - 1.2)
        place = torch.where(u(b, 1) < 0.6, home, place)
        pick = room[:, None, None].expand(-1, 1, 2)
        inside, outside = near.gather(1, pick)[:, 0], beyond.gather(1, pick)[:, 0]
        if points:  # half of the time straight from door to door, cutting the corner
            place = torch.where(u(b, 1) < 0.5, 0.35 * (points[-1] + inside), place)
        gate = gates.gather(1, room[:, None, None].expand(-1, 1, 6))[:, 0, 3:]
        spot = spots.gather(1, pick)[:, 0] + (u(b, 2) - 0.5) * 0.4
        points += [place, inside, outside, spot, outside, inside]
        ahead += [none, gate, none, none, gate, none]
        look += [0.3, 0.0, 0.0, 0.45, 0.0, 0.0]
        room = torch.where(u(b) < 0.4, room, (u(b, 4) * allowed).argmax(1))
    chance = torch.tensor(look, device=dev).expand(b, -1)
    return _Plan(torch.stack(points, 1), chance, torch.stack(ahead, 1))


def _corridor_plan(dice: Dice, scene: Scene, n: int) -> _Plan:
    """To and fro between the nodes of the corridor's centre line, turning back at its ends and now and
    then."""
    b, u, dev = len(scene), dice.uniform, scene.device
    last = scene.path.shape[1] - 1
    padded = (scene.path[:, -1] == scene.path[:, -2]).all(-1)  # [B]
    end = torch.where(padded, last - 1, last)
    node, way, points = (u(b) * (end + 1)).long().clamp_max(last), dice.sign(b).long(), []
    for _ in range(n // 30 + 3):
        at = scene.path.gather(1, node[:, None, None].expand(-1, 1, 2))[:, 0]
        points.append(at + (u(b, 2) - 0.5) * 0.4)
        way = torch.where(u(b) < 0.2, -way, way)
        way = torch.where(node == 0, 1, torch.where(node == end, -1, way))
        node = node + way
    track = torch.stack(points, 1)
    return _Plan(track, torch.full(track.shape[:2], 0.4, device=dev), torch.zeros(*track.shape[:2], 3, device=dev))


def _follow(dice: Dice, scene: Scene, plan: _Plan, n: int) -> Tensor:
    """Walk along a plan for n frames, pose [B, n, 4]: turn and look around at waypoints, then go straight."""
    centre, radius = obstacles(scene)
    points, u = push_out(plan.points, centre, radius + _CLEARANCE), dice.uniform
    b, k = points.shape[:2]
    moves = points[:, 1:] - points[:, :-1]  # [B, K - 1, 2]
    length = moves.norm(dim=-1)
    heading = torch.atan2(moves[..., 0], moves[..., 1])
    turn = torch.cat([torch.zeros_like(heading[:, :1]), heading[:, 1:] - heading[:, :-1]], 1)
    turn = (turn + math.pi) % _TAU - math.pi
    looks = u(b, k - 1) < plan.look[:, :-1]
    full = looks & (u(b, k - 1) < 0.15)  # a look around is a full turn, or a sweep to one side and back
    turn = turn + torch.where(full, dice.sign(b, k - 1) * _TAU, 0.0)
    sweep = torch.where(looks & ~full, dice.sign(b, k - 1) * (0.5 + 1.6 * u(b, k - 1)), 0.0)
    rate = 0.08 + (_TURN - 0.08) * u(b, 1)
    rest = torch.where(u(b, k - 1) < 0.2, 12 * u(b, k - 1), 0.0) * (plan.look[:, :-1] > 0)
    dwell = (turn.abs() + math.pi * sweep.abs()) / rate + rest
    speed = 0.09 + 0.06 * u(b, k - 1)

    # Clock: when each waypoint is reached, and when it is left; a sliding door is waited for.
    arrive, leave, now = [], [], -20 * u(b)
    for i in range(k - 1):
        arrive.append(now)
        ready = now + dwell[:, i]
        slides, omega, phase = plan.gate[:, i].unbind(-1)
        since = (omega * ready + phase - _OPEN[0]) % _TAU
        crossing = omega * (length[:, i] / speed[:, i] + 16)  # with a margin for smoothing
        wait = torch.where(since > _OPEN[1] - crossing, (_TAU - since) / omega.clamp_min(1e-3), 0.0) + 6
        ready = ready + torch.where(slides > 0, wait, 0.0)
        leave.append(ready)
        now = ready + length[:, i] / speed[:, i]
    reach, start = torch.stack(arrive, 1), torch.stack(leave, 1)  # [B, K - 1]
    t = torch.arange(n, device=points.device, dtype=torch.float32).expand(b, n).contiguous()
    leg = (torch.searchsorted(reach, t, right=True) - 1).clamp(0, k - 2)  # [B, n]
    step = (t - start.gather(1, leg)) * speed.gather(1, leg)  # metres since the waypoint was left
    total = length.gather(1, leg)
    share = (torch.minimum(step, total) / total.clamp_min(1e-3)).clamp_min(0)
    pair = leg[..., None].expand(-1, -1, 2)
    point = points.gather(1, pair) + share[..., None] * moves.gather(1, pair)
    ahead = moves.gather(1, pair) / total.clamp_min(1e-3)[..., None]
    point = _pass_by(point, ahead, centre, radius + _CLEARANCE)
    done = ((t - reach.gather(1, leg)) / dwell.gather(1, leg).clamp_min(1e-3)).clamp(0, 1)  # of the turn
    before = heading[:, :1] + turn.cumsum(1) - turn  # yaw when each waypoint is reached
    yaw = before.gather(1, leg) + done * turn.gather(1, leg)
    yaw = yaw + sweep.gather(1, leg) * torch.sin(math.pi * done).square()
    yaw = smooth(yaw[..., None], 7)[..., 0]
    glance = 0.5 * u(b, 1) * torch.sin((0.02 + 0.04 * u(b, 1)) * t + _TAU * u(b, 1))
    return torch.cat([smooth(point, 9), (yaw + glance)[..., None], _nod(dice, b, t)[..., None]], -1)


def _pass_by(point: Tensor, ahead: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Bend straight legs around discs [B, m, 2], [B, m], each on the side on which it would have passed.

    point [B, n, 2], ahead [B, n, 2] unit direction of the leg. A radial push would throw a path that crosses
    the middle of a disc from its front to its back.
    """
    right = torch.stack([ahead[..., 1], -ahead[..., 0]], -1)  # [B, n, 2]
    for j in range(centre.shape[1]):
        offset = point - centre[:, j, None]
        along, aside = (offset * ahead).sum(-1), (offset * right).sum(-1)  # [B, n]
        room = (radius[:, j, None].square() - along.square()).clamp_min(0).sqrt()
        shift = torch.where(aside < 0, -1.0, 1.0) * (room - aside.abs()).clamp_min(0)
        point = point + shift[..., None] * right
    return point
