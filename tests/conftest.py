"""Fixtures that change how gn_fast runs, and put it back."""

import signal

import pytest

import gn_fast
from gn_fast import _core

# What a job in the background or under nohup ignores, its children would too.
for name, handler in {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}.items():
    if getattr(signal, name, None) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)


@pytest.fixture
def three_processors(monkeypatch):
    """Three threads even where there are fewer CPUs: what they compute does not depend on when they run."""
    monkeypatch.setattr(_core, "_processors", lambda: 3)
    with gn_fast.num_threads(3):
        assert gn_fast.get_num_threads() == 3
