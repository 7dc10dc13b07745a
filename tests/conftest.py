"""Fixtures that change how gn_fast runs, and put it back."""

import pytest

import gn_fast
from gn_fast import _core


@pytest.fixture
def three_processors(monkeypatch):
    """Three threads even where there are fewer CPUs: what they compute does not depend on when they run."""
    monkeypatch.setattr(_core, "_processors", lambda: 3)
    with gn_fast.num_threads(3):
        assert gn_fast.get_num_threads() == 3
