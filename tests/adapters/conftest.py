"""Teachers of tiny pipelines and a finished run on one; the stand-in of FastGen."""

from __future__ import annotations

import sys

import pytest
import tiny_pipelines
from accelerate.state import AcceleratorState
from scripts import TRAINERS


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {kind: str(tiny_pipelines.save(kind, folder / kind)) for kind in tiny_pipelines.KINDS}


@pytest.fixture(scope="session")
def trained(teachers, tmp_path_factory):
    """A finished run with checkpoints; tests only read it."""
    from lcm_students import options, train

    trainer = train(options(teachers["sd15"], tmp_path_factory.mktemp("trained"), checkpoint_every=2))
    AcceleratorState._reset_state(True)
    return trainer


@pytest.fixture
def fresh():
    """Accelerate keeps its state for the process."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def fastgen(monkeypatch):
    """The stand-in, under the names that FastGen's own modules have."""
    monkeypatch.syspath_prepend(str(TRAINERS))
    import fastgen as module

    monkeypatch.setitem(sys.modules, "fastgen.callbacks.callback", module.callbacks)
    yield module
    for name in ("fastgen", "networks"):
        sys.modules.pop(name, None)


@pytest.fixture
def made(fastgen):
    """Return what makes FastGen's model and a round of its loop, for the kit."""

    def made(**options):
        def make():
            model = fastgen.DMD2Model(**options)
            model.init_optimizers()
            iterations = iter(range(1, 10**6))
            return model, lambda: model.step(next(iterations))

        return make

    return made
