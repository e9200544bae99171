"""A recorded path, and a copy of it to be damaged."""

from __future__ import annotations

import shutil

import pytest
from worlds import Run

import disback_plugin as disback


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    run = Run()
    disback.record(run.teacher, run.fake_score, run.fake_step, path=folder, iterations=6, every=2)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "path")
