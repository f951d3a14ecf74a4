import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldstride.control import KNOWN_KEYS, Action, ControlSettings, Motion, actions_per_frame, motion
from worldstride.errors import InputError

SETTINGS = ControlSettings()


def test_keys_of_any_iterable_become_one_hashable_action():
    assert Action(["KeyW", "KeyW"]) == Action({"KeyW"}) == Action(iter(["KeyW"]))  # pyright: ignore
    assert len({Action(["KeyW"]), Action(("KeyW",))}) == 1  # pyright: ignore


@pytest.mark.parametrize(("code", "hint"), [("w", "KeyW"), ("left", "ArrowLeft"), ("space", "Space")])
def test_unknown_key_names_it_the_guess_and_the_known_codes(code: str, hint: str):
    with pytest.raises(InputError, match=rf"'{code}'.*did you mean '{hint}'.*KeyA-KeyZ.*Space"):
        Action(frozenset({code}))


@pytest.mark.parametrize("keys", ["KeyW", 3, None, [7], [["KeyW"]]])
def test_keys_of_wrong_type(keys: object):
    with pytest.raises(InputError, match="key"):
        Action(keys)  # pyright: ignore


@pytest.mark.parametrize(
    "mouse",
    [
        (math.nan, 0),
        (0, math.inf),
        (1,),
        (1, 2, 3),
        "12",
        ("1", 2),
        5,
        None,
        (True, 0),
        {"x": 1, "y": 2},
        (10**400, 0),
    ],
)
def test_bad_mouse(mouse: object):
    with pytest.raises(InputError, match="mouse"):
        Action(frozenset(), mouse)  # pyright: ignore


@given(st.frozensets(st.sampled_from(sorted(KNOWN_KEYS)), max_size=4), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
@settings(max_examples=30, deadline=None)
def test_json_round_trip(keys: frozenset[str], dx: float, dy: float):
    action = Action(keys, (dx, dy))
    assert Action.from_json(action.to_json()) == action


def test_json_entries_are_optional_and_foreign_ones_refused():
    assert Action.from_json({}) == Action()
    with pytest.raises(InputError, match="jump"):
        Action.from_json({"jump": True})
    with pytest.raises(InputError, match="object"):
        Action.from_json(["KeyW"])


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        (["KeyW"], Motion(0.11, 0, 0, 0)),
        (["KeyS"], Motion(-0.11, 0, 0, 0)),
        (["KeyD"], Motion(0, 0.11, 0, 0)),
        (["KeyA"], Motion(0, -0.11, 0, 0)),
        (["ArrowRight"], Motion(0, 0, 0.12, 0)),
        (["KeyQ", "ArrowLeft"], Motion(0, 0, -0.12, 0)),
        (["ArrowUp"], Motion(0, 0, 0, 0.06)),
        (["ArrowDown"], Motion(0, 0, 0, -0.06)),
        (["KeyW", "KeyS", "KeyQ", "KeyE", "ShiftLeft"], Motion(0, 0, 0, 0)),
        (["KeyW", "KeyA", "KeyD"], Motion(0.11, 0, 0, 0)),
    ],
)
def test_motion_of_keys(keys: list[str], wanted: Motion):
    assert motion(Action(frozenset(keys)), SETTINGS) == wanted


def test_diagonals_are_as_long_as_straight_steps():
    step = motion(Action(frozenset({"KeyW", "KeyD"})), SETTINGS)
    assert step.forward == step.strafe > 0
    assert math.hypot(step.forward, step.strafe) == pytest.approx(SETTINGS.speed)


def test_mouse_right_turns_right_and_mouse_down_looks_down():
    moved = motion(Action(frozenset(), (100, 40)), SETTINGS)
    assert (moved.turn, moved.pitch) == (pytest.approx(0.25), pytest.approx(-0.1))


def test_settings_can_change_keys_and_are_checked():
    french = ControlSettings(forward_keys=("KeyZ",))
    assert motion(Action(frozenset({"KeyZ"})), french).forward == french.speed
    assert motion(Action(frozenset({"KeyW"})), french).forward == 0
    with pytest.raises(InputError, match="forward_keys"):
        ControlSettings(forward_keys=("z",))
    with pytest.raises(InputError, match="speed"):
        ControlSettings(speed=-1)
    with pytest.raises(InputError, match="turn"):
        ControlSettings(turn=math.nan)


def test_one_action_is_held_and_its_mouse_spread():
    held = actions_per_frame(Action(frozenset({"KeyW"}), (8, -4)), 4)
    assert held == (Action(frozenset({"KeyW"}), (2, -1)),) * 4


def test_a_sequence_must_fit():
    pair = [Action(), Action(frozenset({"KeyW"}))]
    assert actions_per_frame(pair, 2) == tuple(pair)
    with pytest.raises(InputError, match=r"3 frames.*got 2"):
        actions_per_frame(pair, 3)
    with pytest.raises(InputError, match="at least 1"):
        actions_per_frame(pair, 0)
    with pytest.raises(InputError, match="sequence"):
        actions_per_frame("ww", 2)  # pyright: ignore
