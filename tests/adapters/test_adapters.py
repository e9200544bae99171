"""Adapters import nothing that they adapt, and refuse with the reason what cannot have DisBack."""

from __future__ import annotations

import ast
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from worlds import Run

import disback_plugin as disback
from disback_plugin.errors import RoleError
from disback_plugin.testing import check_adapter

ADAPTERS = Path(__file__).parents[2] / "adapters"
TRAINERS = Path(__file__).parents[1] / "trainers"
FILES = {file.stem: file for file in ADAPTERS.glob("*.py") if file.stem != "__init__"}
FILES |= {file.parent.name: file for file in ADAPTERS.glob("*/__init__.py")}
# A package has the adapter in its __init__, and beside it a trainer of our own, which may import what it likes.
OWN = sorted(file for file in ADAPTERS.glob("*/*.py") if file.stem != "__init__")


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_an_adapter_imports_public_names_and_none_of_what_it_adapts(file):
    public = {*disback.__all__, *disback.plugins.__all__, "RoleError"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            top = node.module.partition(".")[0]
            assert top in {"disback_plugin", *sys.stdlib_module_names}, node.module
            if top == "disback_plugin":
                assert {alias.name for alias in node.names} <= public
        elif isinstance(node, ast.Import):
            assert all(alias.name in sys.stdlib_module_names for alias in node.names)
    assert len(file.read_text().splitlines()) <= 120


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.stem)
def test_a_trainer_of_our_own_imports_public_names(file):
    public = set(disback.__all__)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "disback_plugin":
            assert node.module in {"disback_plugin", "disback_plugin.errors", "disback_plugin.plugins"}
            assert node.module != "disback_plugin" or {alias.name for alias in node.names} <= public
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("disback_plugin.") for alias in node.names)
    assert len(file.read_text().splitlines()) <= 350


def test_every_adapter_is_found_through_its_entry_point():
    ours = {p.name for p in entry_points(group="disback.adapters") if p.value.startswith("disback_adapters.")}
    assert ours == set(FILES)


# -- the kit ----------------------------------------------------------------------------------------------------------


def test_the_kit_passes_an_adapter_that_is_right(made):
    check_adapter("fastgen", made())


def test_the_kit_names_what_is_wrong(made, monkeypatch):
    from disback_adapters import fastgen as adapter

    def swapped(trainer):
        return disback.Adapter(trainer.fake_score, trainer.teacher, trainer.net_optimizer, trainer.fake_score_optimizer)

    swapped.disback_impl = adapter.disback_adapter.disback_impl
    monkeypatch.setattr(adapter, "disback_adapter", swapped)
    with pytest.raises(RoleError, match="steps the teacher"):
        check_adapter("fastgen", made())


def test_the_kit_refuses_a_loop_that_is_not_the_same_twice(made):
    make = made()

    def unsteady():
        model, step = make()
        torch.seed()
        return model, step

    with pytest.raises(AssertionError, match="the same run twice"):
        check_adapter("fastgen", unsteady)


NAMES = {
    "sid": {
        "true_score": "teacher",
        "fake_score": "fake_score",
        "g_optimizer": "optimizer_g",
        "fake_score_optimizer": "optimizer_f",
    },
    "diff_instruct": {"net": "teacher", "Sg": "fake_score", "g_optimizer": "optimizer_g", "optimizer": "optimizer_f"},
}


@pytest.mark.parametrize("adapter", NAMES)
def test_the_kit_passes_the_adapters_of_local_variables(adapter):
    def make():
        run = Run()
        return SimpleNamespace(**{name: getattr(run, ours) for name, ours in NAMES[adapter].items()}), run.step

    check_adapter(adapter, make)


@pytest.fixture
def self_forcing(monkeypatch):
    """The class of Self-Forcing's trainer."""
    monkeypatch.syspath_prepend(str(TRAINERS))
    from trainer.distillation import Trainer

    yield Trainer
    for name in [name for name in sys.modules if name.partition(".")[0] in ("trainer", "networks")]:
        del sys.modules[name]


def test_the_kit_passes_self_forcings_trainer(self_forcing):
    def make():
        trainer = self_forcing(SimpleNamespace(generator_ckpt=None, real_width=8))

        def step():
            for optimizer in (trainer.critic_optimizer, trainer.generator_optimizer):
                optimizer.zero_grad()
                trainer.fwdbwd_one_step({"prompts": [""] * 8}, optimizer is trainer.generator_optimizer)
                optimizer.step()

        return trainer, step

    check_adapter("self_forcing", make)
