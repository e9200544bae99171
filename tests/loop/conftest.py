"""A finished path."""

from __future__ import annotations

import pytest
from worlds import Run

import disback_plugin as disback


@pytest.fixture
def recorded(tmp_path):
    """A finished path of two nodes, and the run that recorded it, detached."""
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule="fixed:2"):
        run.steps(3)
    return tmp_path
