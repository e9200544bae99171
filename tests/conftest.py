"""What all tests share: a hypothesis profile, one thread, and a tiny distillation run on which everything is tried."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from ranks import Nursery

# torch's first call takes seconds; in CI the examples are the same at each run, elsewhere new ones are looked for.
settings.register_profile(
    "disback",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
    print_blob=True,
)
settings.load_profile("disback")


@pytest.hookimpl(optionalhook=True, tryfirst=True)  # a hook of pytest-xdist for `-n auto` in pyproject.toml
def pytest_xdist_auto_num_workers(config):
    """Return 0 for chosen files: they run in one process. None leaves the number to pytest-xdist."""
    return None if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # Bitwise comparisons between runs need one order of summation.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _no_search_among_imported_objects():
    # `attach` looks for learning-rate schedulers among all objects that are not frozen: a million after a few imports.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


@pytest.fixture
def global_random_state():
    """The state of torch's global generator; asserts at the end that the test left it alone."""
    before = torch.get_rng_state()
    yield before
    assert torch.equal(torch.get_rng_state(), before), "something drew from the global random generator"


@pytest.fixture(scope="session")
def nursery():
    """Where ranks come from: `nursery.play(function, ranks, ...)`."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def site(tmp_path_factory, monkeypatch):
    """A folder where distributions can be installed, for one test."""
    folder = tmp_path_factory.mktemp("site-packages")
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for module in set(sys.modules) - before:
        if Path(getattr(sys.modules[module], "__file__", None) or "/").parent == folder:
            del sys.modules[module]
