"""Teachers of tiny pipelines and a finished run on one; the stand-ins of trainers with callbacks."""

from __future__ import annotations

import importlib
import sys

import pytest
import tiny_pipelines
from accelerate.state import AcceleratorState
from scripts import TRAINERS

CALLBACKS = {"fastgen": "fastgen.callbacks.callback", "fastvideo": "fastvideo.train.callbacks.callback"}


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
def stand_in(monkeypatch):
    """Return a function that imports a stand-in, with its callbacks under the name that the trainer's own have."""
    imported = ["networks"]

    def stand_in(name):
        monkeypatch.syspath_prepend(str(TRAINERS))
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, CALLBACKS[name], module.callbacks)
        imported.append(name)
        return module

    yield stand_in
    for name in imported:
        sys.modules.pop(name, None)


@pytest.fixture
def fastgen(stand_in):
    return stand_in("fastgen")


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
