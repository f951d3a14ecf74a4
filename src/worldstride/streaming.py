"""Chunks made ahead: the next one is begun before the frames of this one are waited for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch

from worldstride.errors import InputError
from worldstride.session import Session, planned
from worldstride.state import Chunk, SessionState, moved_on, shown
from worldstride.stepping import Begun, begin
from worldstride.wishes import Wish, Wished


def made_ahead(session: Session, wishes: Iterator[Wish]) -> Iterator[Chunk]:
    """See `Session.stream`.

    While a chunk is made the session is the one before it, and moves on when the chunk is handed out. The next one is
    begun from the state that is to come; it is dropped where that never comes, or where settings have changed.
    """
    ahead, beside = _Ahead(session), session.engine.beside
    wish, since = _next(wishes), time.perf_counter()
    while wish is not None:
        base = session._state
        with torch.inference_mode():
            decoding = ahead.making(wish).decode(beside)
            state = moved_on(decoding.left[0])
            remembered = beside.now()
        wish = _next(wishes)  # not in inference mode: it is the caller's code
        if session._state is not base:
            raise InputError(
                "what gives a stream its actions has stepped or corrected the session, which had a chunk under way; "
                "do so between chunks"
            )
        if wish is not None:
            ahead.begin(state, wish)
        with torch.inference_mode():
            (made,) = decoding.finish()
            with beside.after(remembered):  # the current stream has the next chunk to make first
                state.history.settle()
            now = time.perf_counter()
            chunk = shown(made, state, now - since)
        del decoding, made
        since, session._state = now, state
        yield chunk


class _Ahead:
    """The chunk that is begun next."""

    def __init__(self, session: Session) -> None:
        with torch.inference_mode():
            session._prompt()  # once for both
        self._session = session
        self._lead = session.fork()  # plans from states that the session is not in yet
        self._begun: Begun | None = None
        self._from: tuple[object, ...] = ()

    def begin(self, state: SessionState, wish: Wish) -> None:
        """Begin a chunk from a state that is to come; one that cannot be begun now is begun when it is due."""
        try:
            self._begun = self._begin(state, wish)
        except Exception:
            self._begun = None  # `making` tries again, and says what is wrong
        self._from = state, self._session.acceleration

    def making(self, wish: Wish) -> Begun:
        """The chunk that goes on from the session as it is: begun already, or now."""
        state, settings = self._from if self._from else (None, None)
        begun, self._begun, self._from = self._begun, None, ()
        if begun is not None and state is self._session._state and settings == self._session.acceleration:
            return begun
        begun = None  # gigabytes that the right one can use
        return self._begin(self._session._state, wish)

    @torch.inference_mode()
    def _begin(self, state: SessionState, wish: Wish) -> Begun:
        lead = self._lead
        lead._state, lead.acceleration = state, self._session.acceleration
        action, cameras, intrinsics = wish(state)
        return begin(planned([lead._ask(action, cameras, None, intrinsics, None)]))


def _next(wishes: Iterator[Wish]) -> Wish | None:
    """The next wish, or None after the last; one that cannot be had fails when its chunk is due."""
    try:
        return next(wishes, None)
    except Exception as error:
        return partial(_fail, error)


def _fail(error: Exception, state: SessionState) -> Wished:
    raise error
