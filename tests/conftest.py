"""Fixtures that change how gn_fast runs, and put it back."""

import signal

import pytest

import gn_fast
from gn_fast import _core

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background, whose children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def three_processors(monkeypatch):
    """Three threads even where there are fewer CPUs: what they compute does not depend on when they run."""
    monkeypatch.setattr(_core, "_processors", lambda: 3)
    with gn_fast.num_threads(3):
        assert gn_fast.get_num_threads() == 3
