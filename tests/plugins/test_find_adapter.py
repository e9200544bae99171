"""Adapters are found through their entry points, a third party's exactly as our own."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from sites import KNOWS, MISTAKES, Dmd2Trainer, install
from torch import nn
from worlds import Run, difference

import disback_plugin as disback
from disback_plugin import hookimpl
from disback_plugin.errors import OptionError, PluginError, RoleError
from disback_plugin.plugins import find_adapter
from disback_plugin.plugins.hookspecs import ADAPTERS
from disback_plugin.weights.network import ScoreNetwork


@pytest.mark.parametrize("adapter", ["dmd2", None])
@pytest.mark.parametrize("wrapper", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_dmd2_trainer_needs_one_statement(tmp_path, adapter, wrapper):
    trainer = Dmd2Trainer(wrapper)
    original = ScoreNetwork(trainer.run.teacher).fingerprint()
    with disback.attach(
        trainer, adapter=adapter, path=tmp_path, record=4, every=2, schedule=disback.schedules.Fixed(2)
    ) as handle:
        generator = {k: v.clone() for k, v in trainer.run.generator.state_dict().items()}
        trainer.train(4)
        assert difference(dict(trainer.run.generator.state_dict()), generator) == []
        trainer.train(2)
        assert (handle.phase, handle.position) == ("backtracking", 1.0)
        trainer.train(6)
        assert handle.phase == "done"
    assert ScoreNetwork(trainer.run.teacher).fingerprint() == original


def test_a_dmd2_trainer_without_a_teacher_is_refused_with_the_reason(tmp_path):
    trainer = Dmd2Trainer()
    del trainer.model.guidance_model.real_unet
    trainer.args = SimpleNamespace(gan_alone=True)
    with pytest.raises(RoleError, match="--gan_alone"):
        disback.attach(trainer, path=tmp_path)


def test_an_unknown_trainer_names_who_was_asked(tmp_path):
    with pytest.raises(RoleError, match=r"builtins\.dict that no adapter understands \(asked .*dmd2"):
        disback.attach({}, path=tmp_path)


def test_an_unknown_adapter_lists_the_installed_ones(tmp_path):
    with pytest.raises(OptionError, match=r"adapter='dmd3'; expected one of \[.*'dmd2'"):
        disback.attach(Dmd2Trainer(), adapter="dmd3", path=tmp_path)


@pytest.mark.parametrize("arguments", [{}, {"adapter": "dmd2"}, {"teacher": nn.Linear(1, 1)}])
def test_incomplete_roles_are_refused(tmp_path, arguments):
    with pytest.raises(OptionError, match="one or the other, completely"):
        disback.attach(**arguments, path=tmp_path)


def test_a_trainer_together_with_roles_is_refused(tmp_path):
    trainer = Dmd2Trainer()
    with pytest.raises(OptionError, match=r"attach\(trainer, teacher, "):
        disback.attach(trainer, **trainer.run.roles(), path=tmp_path)


# -- a third party's -------------------------------------------------------------------------------------------------


def keyed(run):
    return {"s_theta": run.teacher, "s_phi": run.fake_score, "opt_g": run.optimizer_g, "opt_f": run.optimizer_f}


def test_a_third_partys_adapter_is_found_like_our_own(site, tmp_path):
    install(site, "mine", KNOWS, group="disback.adapters")
    run = Run()
    with disback.attach(keyed(run), path=tmp_path / "path", record=1, every=1) as handle:
        run.steps(2)
        assert handle.generator_updates == 1


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_adapter_raises_only_if_it_was_asked_for(site, tmp_path, mistake):
    source, reason = MISTAKES[mistake]
    install(site, "broken", source, group="disback.adapters")
    with disback.attach(Dmd2Trainer(), path=tmp_path / "path", record=1, every=1):
        pass
    reason = re.escape(reason)
    with pytest.raises(RoleError, match=rf"left out: broken of disback-broken 1\.0 \({reason}"):
        disback.attach({}, path=tmp_path / "none")
    with pytest.raises(PluginError, match=reason):
        disback.attach({}, adapter="broken", path=tmp_path / "none")


@pytest.mark.parametrize("answer", ["raise ValueError('oops')", "return 7"])
def test_an_adapter_that_fails_when_asked_is_passed_over(site, tmp_path, caplog, answer):
    install(site, "theirs", f"@hookimpl(tryfirst=True)\ndef disback_adapter(trainer):\n    {answer}", group=ADAPTERS)
    with disback.attach(Dmd2Trainer(), path=tmp_path / "path", record=1, every=1):
        pass
    assert "theirs of disback-theirs 1.0 is broken" in caplog.text
    with pytest.raises(PluginError, match=r"oops|a int, not an Adapter"):
        disback.attach(Dmd2Trainer(), adapter="theirs", path=tmp_path / "path")


def test_a_refusal_is_raised_only_if_no_other_adapter_knows_the_trainer(site):
    refuses = "from disback_plugin.errors import RoleError\n@hookimpl(tryfirst=True)\ndef disback_adapter(trainer):\n"
    install(site, "no", f"{refuses}    raise RoleError('a thing', expected='another', cure='go')", group=ADAPTERS)
    assert find_adapter(Dmd2Trainer())
    with pytest.raises(RoleError, match="found a thing"):
        find_adapter({})


def test_only_the_adapter_that_is_asked_for_is_imported(site, tmp_path):
    module = install(site, "other", "raise RuntimeError('imported')", group="disback.adapters")
    with disback.attach(Dmd2Trainer(), adapter="dmd2", path=tmp_path / "path", record=1, every=1):
        assert module not in sys.modules


def test_the_adapter_that_knows_the_trainer_is_a_plug_in_of_the_run_and_the_others_are_not(site, tmp_path):
    hears = "heard = []\n@hookimpl\ndef disback_after_path_completed(path):\n    heard.append(path)\n"
    mine = install(site, "mine", KNOWS + hears, group="disback.adapters")
    other = install(site, "other", "@hookimpl\ndef disback_adapter(trainer): pass\n" + hears, group="disback.adapters")
    run = Run()
    with disback.attach(keyed(run), path=tmp_path / "path", record=2, every=1) as handle:
        run.steps(2)
    assert sys.modules[mine].heard == [handle.path]
    assert sys.modules[other].heard == []


def test_an_adapter_may_be_an_object_of_the_script(tmp_path):
    class Mine:
        @hookimpl
        def disback_adapter(self, trainer):
            return disback.Adapter(*trainer)

    run = Run()
    with disback.attach(tuple(run.roles().values()), path=tmp_path, record=1, every=1, plugins=[Mine()]) as handle:
        run.steps(2)
        assert handle.generator_updates == 1
