"""Scripts find the stand-ins' modules, and leave none of them behind."""

from __future__ import annotations

import pytest
from scripts import TRAINERS, forget_trainers


@pytest.fixture(autouse=True)
def _trainers_on_the_path(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(TRAINERS))
    monkeypatch.chdir(tmp_path)
    yield
    forget_trainers()
