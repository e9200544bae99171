"""Plug-ins and adapters are found through their entry points, a third party's exactly as our own; a broken one stops
nobody who did not ask for it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin import hookimpl, hooks
from disback_plugin.errors import OptionError, PluginError, RoleError
from disback_plugin.hooks import Plugins
from disback_plugin.hookspecs import ARGUMENTS
from disback_plugin.schedules import Fixed, Ramp
from disback_plugin.weights import ScoreNetwork


class Dmd2Trainer:
    """A stand-in with the names of DMD2's trainers (main/train_sd.py:229-260, main/sd_guidance.py:45-58)."""

    def __init__(self, wrapper=lambda module: module):
        self.run = Run()
        guidance = nn.Module()
        guidance.real_unet, guidance.fake_unet = self.run.teacher, self.run.fake_score
        guidance.cls_pred_branch = nn.Linear(2, 1)
        self.model = nn.Module()
        self.model.guidance_model = wrapper(guidance)
        self.model.feedforward_model = self.run.generator
        self.optimizer_generator = self.run.optimizer_g
        # The guidance optimizer steps the discriminator's head too.
        trained = [p for p in guidance.parameters() if p.requires_grad]
        self.optimizer_guidance = self.run.optimizer_f = torch.optim.AdamW(trained, lr=1e-2)

    def train(self, steps):
        for step in range(steps):
            if step % 2 == 0:  # dfake_gen_update_ratio = 2, the generator's turn first
                self.run.generator_step()
            # sd_unified_model.py:304-310 flips the flags of the whole guidance model, the teacher's with them
            self.model.guidance_model.requires_grad_(True)
            self.run.fake_step()


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
    with pytest.raises(RoleError, match="--gan_alone"):
        disback.attach(trainer, path=tmp_path)


def test_an_unknown_trainer_names_who_was_asked(tmp_path):
    with pytest.raises(RoleError, match=r"builtins\.dict that no adapter understands \(asked .*dmd2"):
        disback.attach({}, path=tmp_path)


def test_an_unknown_adapter_lists_the_installed_ones(tmp_path):
    with pytest.raises(OptionError, match=r"adapter='dmd3'; expected one of \[.*'dmd2'"):
        disback.attach(Dmd2Trainer(), adapter="dmd3", path=tmp_path)


@pytest.mark.parametrize("arguments", [{}, {"adapter": "dmd2"}, {"teacher": nn.Linear(1, 1)}])
def test_half_of_the_roles_are_refused(tmp_path, arguments):
    with pytest.raises(OptionError, match="one or the other, completely"):
        disback.attach(**arguments, path=tmp_path)


def test_a_trainer_and_roles_are_one_too_many(tmp_path):
    trainer = Dmd2Trainer()
    with pytest.raises(OptionError, match=r"attach\(trainer, teacher, "):
        disback.attach(trainer, **trainer.run.roles(), path=tmp_path)


# -- installed plug-ins -----------------------------------------------------------------------------------------------


def install(folder, name, source, *, group="disback.hooks", distribution=None):
    """Leave in a folder what pip leaves there: a module, and a distribution whose entry point names it."""
    distribution = distribution or f"disback-{name}"
    module = f"{distribution.replace('-', '_')}_{name}"
    (folder / f"{module}.py").write_text("from disback_plugin import Adapter, hookimpl\n" + source)
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
    return module


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


def found(plugins, name):
    (plugin,) = [plugin for plugin in plugins.listed() if plugin.name == name]
    return plugin


KNOWS = """
@hookimpl
def disback_adapter(trainer):
    if isinstance(trainer, dict) and "s_theta" in trainer:
        return Adapter(trainer["s_theta"], trainer["s_phi"], trainer["opt_g"], trainer["opt_f"])
"""

WELL = """
@hookimpl
def disback_after_node_swapped(position):
    pass
"""

# What a third party may do wrong before anything is called, and how that is named.
MISTAKES = {
    "raises": ("raise RuntimeError('no GPU here')", "RuntimeError: no GPU here"),
    "exits": ("import sys\nsys.exit(3)", "SystemExit: 3"),
    "imports": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("def", "SyntaxError: "),
    "misspelt": (
        "@hookimpl\ndef disback_after_node_swop(position): pass",
        "disback_after_node_swop is no hook (disback_after_node_swapped is)",
    ),
    "argument": (
        "@hookimpl\ndef disback_log(values, stp): pass",
        "disback_log has no argument stp, only values, step",
    ),
    "unmarked": ("def disback_log(values, step): pass", "disback_log is not marked with @hookimpl"),
    "wrapper": (
        "@hookimpl(wrapper=True)\ndef disback_log(values):\n    return (yield)",
        "disback_log is a wrapper, and a plug-in answers for itself alone",
    ),
    "empty": ("", "it implements no hook"),
}


def a_run(folder, steps=9, **options):
    """Everything that a run leaves: what it recorded, where it ended, and what its trainer would save."""
    run = Run()
    options = {"record": 4, "every": 2, "schedule": Fixed(2)} | options
    with disback.attach(**run.roles(), path=folder, **options) as handle:
        run.steps(steps)
        state = handle.state_dict()
    state.pop("fake_score")
    return state, run.checkpoint() | {"teacher": clone(dict(run.teacher.state_dict()))}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_plug_in_that_is_wrong_stops_nobody_and_is_named_with_its_distribution(site, tmp_path, caplog, mistake):
    plain = a_run(tmp_path / "plain")
    source, reason = MISTAKES[mistake]
    install(site, "theirs", source)
    beside = a_run(tmp_path / "beside")
    assert beside[0] == plain[0]
    assert difference(beside[1], plain[1]) == []
    assert f"theirs of disback-theirs 1.0 is broken and left out ({reason}" in caplog.text
    plugin = found(Plugins(), "theirs")
    assert plugin.status == "broken"
    assert plugin.reason.startswith(reason)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_that_was_asked_for_raises_and_nothing_is_touched(site, tmp_path, mistake):
    source, reason = MISTAKES[mistake]
    install(site, "theirs", source)
    run = Run()
    with pytest.raises(PluginError) as caught:
        disback.attach(**run.roles(), path=tmp_path / "path", plugins=("theirs",))
    assert "theirs of disback-theirs 1.0" in caught.value.found
    assert reason in caught.value.found
    assert "no:theirs" in caught.value.cure
    assert not (tmp_path / "path").exists()


EVENTS = [hook for hook in ARGUMENTS if hook != "disback_adapter"]


@pytest.mark.parametrize("hook", EVENTS)
def test_a_hook_that_raises_stops_nobody_and_is_called_no_more(site, tmp_path, caplog, hook):
    plain = a_run(tmp_path / "plain")
    install(site, "theirs", f"calls = []\n@hookimpl\ndef {hook}():\n    calls.append(1)\n    raise ValueError('oops')")
    beside = a_run(tmp_path / "beside")
    assert beside[0] == plain[0]
    assert difference(beside[1], plain[1]) == []
    assert sys.modules["disback_theirs_theirs"].calls == [1]
    assert f"theirs of disback-theirs 1.0 is broken and left out (ValueError in {hook}: oops)" in caplog.text


@pytest.mark.parametrize("hook", EVENTS)
def test_a_hook_of_the_script_that_raises_is_an_error_and_the_teacher_comes_back(tmp_path, hook):
    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    names = {"hook": hook, "hookimpl": hookimpl}
    exec("class Theirs:\n    @hookimpl\n    def " + hook + "(self):\n        raise ValueError('oops')", names)
    handle = disback.attach(
        **run.roles(), path=tmp_path / "path", record=4, every=2, schedule=Fixed(2), plugins=(names["Theirs"](),)
    )
    errors = []
    for turn in [run.fake_step, run.generator_step] * 9:
        try:
            turn()
        except PluginError as error:
            errors.append(str(error))
    state = handle.state_dict()
    handle.detach()
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []
    (message,) = errors  # raised once, and left out from then on
    assert re.match(rf"found the plug-in Theirs at 0x\w+ of the script broken \(ValueError in {hook}: oops\)", message)
    plain, checkpoint = a_run(tmp_path / "plain")
    assert state | plain == state, "who goes on all the same has the run without the plug-in"
    assert difference(run.checkpoint(), {key: checkpoint[key] for key in run.checkpoint()}) == []


def test_a_plug_in_that_raises_when_a_finished_path_starts_leaves_the_teacher_alone(tmp_path):
    a_run(tmp_path)

    class Theirs:
        @hookimpl
        def disback_after_node_swapped(self, position):
            if position:
                raise ValueError("oops")

    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    with pytest.raises(PluginError, match="oops"):
        disback.attach(**run.roles(), path=tmp_path, schedule=Fixed(2), plugins=[Theirs()])
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []
    with disback.attach(**run.roles(), path=tmp_path, schedule=Fixed(2)):  # no hook was left
        pass


@pytest.mark.parametrize("how", ["argument", "variable", "command line"])
def test_a_blocked_plug_in_is_never_imported(site, tmp_path, monkeypatch, how, capsys):
    module = install(site, "theirs", WELL)
    if how == "variable":
        monkeypatch.setenv("DISBACK_PLUGINS", "no:nobody, no:theirs")
    if how == "command line":
        from disback_plugin import cli

        assert cli.main(["-p", "no:theirs", "plugins", "--check"]) == 0
        assert "blocked" in capsys.readouterr().out
    else:
        a_run(tmp_path, plugins=("no:theirs",) if how == "argument" else ())
    assert module not in sys.modules
    assert found(Plugins("no:theirs"), "theirs").status == "blocked"


def test_without_autoload_only_what_is_named_takes_part(site, tmp_path, monkeypatch):
    modules = [install(site, name, WELL) for name in ("one", "two", "three")]
    monkeypatch.setenv("DISBACK_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("DISBACK_PLUGINS", "three")
    a_run(tmp_path, plugins=("one",))
    assert [module in sys.modules for module in modules] == [True, False, True]
    with pytest.raises(RoleError, match=r"asked \[\]"):
        Plugins().adapter(Dmd2Trainer())
    assert Plugins().adapter(Dmd2Trainer(), "dmd2")


def test_a_name_that_is_not_there_or_both_wanted_and_not_is_refused(site):
    install(site, "theirs", WELL)
    with pytest.raises(OptionError, match=r"found plug-in 'their'; expected one of \[.*'dmd2', .*'theirs'.*\]"):
        Plugins("their")
    with pytest.raises(OptionError, match="both asked for and blocked"):
        Plugins("theirs", "no:theirs")
    with pytest.raises(OptionError, match="adapter='dmd2', which is blocked"):
        Plugins("no:dmd2").adapter(Dmd2Trainer(), "dmd2")
    with pytest.raises(OptionError, match=r"plugins=\(plugin,\)"):
        Plugins.of("theirs")


def test_of_two_with_one_name_one_is_meant_and_the_other_named(site):
    install(site, "dmd2", "raise RuntimeError('imported')", group="disback.adapters", distribution="somebody-else")
    assert Plugins().adapter(Dmd2Trainer(), "dmd2").teacher
    both = [plugin for plugin in Plugins().listed() if plugin.name == "dmd2"]
    assert [(plugin.distribution, plugin.status) for plugin in both] == [
        ("disback-plugin", "installed"),
        ("somebody-else", "broken"),
    ]
    assert both[1].reason.startswith("its name is taken by dmd2 of disback-plugin ")


def test_a_distribution_that_cannot_be_read_hides_nobody(site):
    install(site, "theirs", WELL)
    for name, points, metadata in (
        ("garbage", "[disback.hooks]\nno equals sign\n", "Metadata-Version: 2.1\nName: garbage\nVersion: 2.0\n"),
        ("nameless", "[disback.hooks]\nunknown = nowhere\n", ""),
        ("valueless", "[disback.hooks]\nempty = \n", "Metadata-Version: 2.1\nName: valueless\n"),
    ):
        info = site / f"{name}-2.0.dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_text(points)
        (info / "METADATA").write_text(metadata)
    plugins = Plugins()
    assert found(plugins, "theirs").status == "ready"
    assert found(plugins, "dmd2").status == "installed"
    garbage = found(plugins, "garbage")
    assert (garbage.status, garbage.version) == ("broken", "2.0")
    assert garbage.reason.startswith("its entry points cannot be read (")
    assert found(plugins, "unknown").distribution == "an unknown distribution"
    assert found(plugins, "empty").reason == (
        "ValueError: an entry point that is '', not package.module or package.module:object"
    )


def test_a_distribution_that_is_there_twice_counts_once(site, tmp_path, monkeypatch):
    install(site, "theirs", WELL)
    install(tmp_path, "theirs", "raise RuntimeError('the shadowed one')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(site))
    assert found(Plugins(), "theirs").status == "ready"


KINDS = {"well": WELL, "adapter": KNOWS} | {name: source for name, (source, _) in MISTAKES.items()}
NUMBER = itertools.count()


@contextmanager
def several(kinds):
    """Distributions of these kinds, each with one plug-in of a name that was never there before."""
    with tempfile.TemporaryDirectory() as folder:
        names = {}
        for kind in kinds:
            name = f"{kind}{next(NUMBER)}"
            group = "disback.adapters" if kind == "adapter" else "disback.hooks"
            names[name] = (kind, install(Path(folder), name, KINDS[kind], group=group))
        sys.path.insert(0, folder)
        try:
            yield names
        finally:
            sys.path.remove(folder)
            for _, module in names.values():
                sys.modules.pop(module, None)


@given(data=st.data(), kinds=st.lists(st.sampled_from(sorted(KINDS)), max_size=5))
def test_listed_is_ready_and_blocked_and_broken_and_each_is_one_of_them(data, kinds):
    with several(kinds) as names:
        blocked = data.draw(st.sets(st.sampled_from(sorted(names)))) if names else set()
        plugins = Plugins(*(f"no:{name}" for name in blocked), autoload=False)
        listed = {plugin.name for plugin in plugins.listed()}
        assert listed == names.keys() | {p.name for p in Plugins(autoload=False).listed()}
        assert not any(module in sys.modules for _, module in names.values())
        checked = plugins.check()
        by_status = {}
        for plugin in checked:
            by_status.setdefault(plugin.status, set()).add(plugin.name)
        assert len(checked) == len(listed) == sum(map(len, by_status.values()))
        assert by_status.keys() <= {"ready", "blocked", "broken"}
        assert by_status.get("blocked", set()) == blocked
        well = {name for name, (kind, _) in names.items() if kind in ("well", "adapter")}
        assert by_status.get("ready", set()) & names.keys() == well - blocked
        assert by_status.get("broken", set()) == names.keys() - well - blocked


# -- adapters ---------------------------------------------------------------------------------------------------------


def keyed(run):
    return {"s_theta": run.teacher, "s_phi": run.fake_score, "opt_g": run.optimizer_g, "opt_f": run.optimizer_f}


def test_a_third_partys_adapter_is_found_like_our_own(site, tmp_path):
    install(site, "mine", KNOWS, group="disback.adapters")
    run = Run()
    with disback.attach(keyed(run), path=tmp_path / "path", record=1, every=1) as handle:
        run.steps(2)
        assert handle.generator_updates == 1


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_adapter_stops_nobody_who_did_not_ask_for_it(site, tmp_path, mistake):
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
    install(site, "theirs", f"@hookimpl(tryfirst=True)\ndef disback_adapter(trainer):\n    {answer}", group=hooks.GROUP)
    with disback.attach(Dmd2Trainer(), path=tmp_path / "path", record=1, every=1):
        pass
    assert "theirs of disback-theirs 1.0 is broken" in caplog.text
    with pytest.raises(PluginError, match=r"oops|a int, not an Adapter"):
        disback.attach(Dmd2Trainer(), adapter="theirs", path=tmp_path / "path")


def test_a_refusal_counts_only_if_nobody_else_knows_the_trainer(site):
    refuses = "from disback_plugin.errors import RoleError\n@hookimpl(tryfirst=True)\ndef disback_adapter(trainer):\n"
    install(site, "no", f"{refuses}    raise RoleError('a thing', expected='another', cure='go')", group=hooks.GROUP)
    assert hooks.find_adapter(Dmd2Trainer())
    with pytest.raises(RoleError, match="found a thing"):
        hooks.find_adapter({})


def test_only_the_adapter_that_is_asked_for_is_imported(site, tmp_path):
    module = install(site, "other", "raise RuntimeError('imported')", group="disback.adapters")
    with disback.attach(Dmd2Trainer(), adapter="dmd2", path=tmp_path / "path", record=1, every=1):
        assert module not in sys.modules


def test_the_adapter_that_knows_the_trainer_hears_of_the_run_and_the_others_do_not(site, tmp_path):
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


# -- what plug-ins are told -------------------------------------------------------------------------------------------


class Everything:
    """Hears of all events."""

    def __init__(self):
        self.heard = []

    @hookimpl
    def disback_after_node_recorded(self, path, node):
        assert path.nodes[-1] == node
        assert (path.folder / node.file).exists()
        self.heard.append(("recorded", node.index))

    @hookimpl
    def disback_after_path_completed(self, path):
        assert path.complete
        self.heard.append(("completed", len(path) - 1))

    @hookimpl
    def disback_after_node_swapped(self, scheduler, position, previous, update):
        assert scheduler.started
        assert (scheduler.position, scheduler.generator_updates) == (position, update)
        self.heard.append(("swapped", previous, position, update))

    @hookimpl
    def disback_log(self, values, step):
        self.heard.append(("log", dict(values), step))


def test_a_run_tells_its_plug_ins_everything_in_order(tmp_path):
    plugin, run = Everything(), Run()
    options = {"record": 4, "every": 2, "schedule": Fixed(2), "plugins": (plugin,)}
    with disback.attach(**run.roles(), path=tmp_path, **options) as handle:
        run.steps(5)
        with handle.original_teacher():  # no part of the walk
            pass
        run.steps(5)
    logs = [event for event in plugin.heard if event[0] == "log" and "disback/position" in event[1]]
    assert [event for event in plugin.heard if event[0] != "log"] == [
        ("recorded", 1), ("recorded", 2), ("completed", 2), ("swapped", 0.0, 1.0, 0), ("swapped", 1.0, 0.0, 2)
    ]  # fmt: skip
    node_1 = handle.path.nodes[0].delta_norm
    for (_, values, step), position, update in zip(logs, (1.0, 0.0), (0, 2), strict=True):
        assert step == update
        assert (values["disback/position"], values["disback/node"]) == (position, position)
        assert values["disback/delta_norm"] == pytest.approx(node_1)
        assert 0 < values["disback/swap_ms"] < 10_000
        assert all(type(value) in (int, float) for value in values.values())


def test_an_evaluation_is_not_told_and_what_the_walk_did_meanwhile_is_told_after_it(tmp_path):
    run, plugin = Run(), Everything()
    options = {"path": tmp_path, "record": 4, "every": 1, "schedule": Ramp(4, start=1.0), "plugins": (plugin,)}
    with disback.attach(**run.roles(), **options) as handle:
        run.steps(5)
        with handle.original_teacher():
            run.steps(2)
        moves = [event[1:] for event in plugin.heard if event[0] == "swapped"]
        assert moves == [(0.0, 4.0, 0), (4.0, 3.0, 1), (3.0, 1.0, 3)]
        assert plugin.heard[-1][1]["disback/delta_norm"] == pytest.approx(
            sum(node.delta_norm for node in handle.path.nodes[1:3])
        )


def test_who_does_not_fail_is_told_of_a_move_though_another_failed_just_then(tmp_path):
    class Fails:
        @hookimpl
        def disback_should_advance(self, updates_in_node):
            return 1 / (2 - updates_in_node) > 9  # fails when the plan moves

    run, plugin = Run(), Everything()
    options = {"path": tmp_path, "record": 4, "every": 2, "schedule": Fixed(2), "plugins": (Fails(), plugin)}
    with disback.attach(**run.roles(), **options) as handle:
        run.steps(5)
        with pytest.raises(PluginError, match="ZeroDivisionError"):
            run.steps(1)
        assert handle.position == 0.0
        assert plugin.heard[-2] == ("swapped", 1.0, 0.0, 2)


def test_leaving_early_and_coming_back_are_told_too(tmp_path):
    run, plugin = Run(), Everything()
    options = {"path": tmp_path, "record": 4, "every": 1, "schedule": Ramp(4)}
    with disback.attach(**run.roles(), **options, plugins=(plugin,)) as handle:
        run.steps(6)
        saved, state = run.checkpoint(), handle.state_dict()
        moves = [event[1:3] for event in plugin.heard if event[0] == "swapped"]
        assert moves == [(0.0, 3.6), (pytest.approx(3.6), pytest.approx(2.7)), (pytest.approx(2.7), pytest.approx(1.8))]
    assert plugin.heard[-2] == ("swapped", pytest.approx(1.8), 0.0, 2)

    late, again = Run(), Everything()
    handle = disback.attach(**late.roles(), **options, plugins=(again,))
    late.load(saved)
    handle.load_state_dict(state)
    moves = [event[1:] for event in again.heard if event[0] == "swapped"]
    assert moves == [(0.0, 3.6, 0), (pytest.approx(3.6), pytest.approx(1.8), 2)]
    with handle.original_teacher():
        handle.detach()
    assert again.heard[-2][1:] == (pytest.approx(1.8), 0.0, 2)


def test_a_reused_path_was_completed_before(tmp_path):
    a_run(tmp_path)
    plugin = Everything()
    a_run(tmp_path, plugins=(plugin,))
    assert {event[0] for event in plugin.heard} == {"swapped", "log"}


def test_the_two_stages_by_hand_tell_the_same(tmp_path):
    plugin, run = Everything(), Run()
    path = disback.record(
        run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=2, every=1, plugins=[plugin]
    )
    assert [event for event in plugin.heard if event[0] != "log"] == [
        ("recorded", 1),
        ("recorded", 2),
        ("completed", 2),
    ]
    assert [event[1]["disback/recording"] for event in plugin.heard if event[0] == "log"] == [2], "one cosine of two"
    scheduler = disback.TrajectoryScheduler(path, run.teacher, run.fake_score, schedule=Fixed(1), plugins=[plugin])
    scheduler.start()
    scheduler.step()
    scheduler.restore()
    assert [event[1:] for event in plugin.heard if event[0] == "swapped"] == [(0.0, 1.0, 0), (1.0, 0.0, 1)]


def test_only_the_main_process_logs_and_every_process_is_told(tmp_path, monkeypatch):
    a_run(tmp_path)
    run, plugin = Run(), Everything()
    path = disback.DegradationPath(tmp_path)
    scheduler = disback.TrajectoryScheduler(path, run.teacher, run.fake_score, schedule=Fixed(1), plugins=[plugin])
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        scheduler.start()
        scheduler.step()
    assert [event[0] for event in plugin.heard] == ["swapped", "swapped"]


def test_a_run_with_eight_plug_ins_is_the_run_without_bit_for_bit(site, tmp_path, global_random_state):
    for number in range(8):
        install(site, f"p{number}", WELL)
    alone = a_run(tmp_path / "alone", schedule=Ramp(5), plugins=[f"no:p{number}" for number in range(8)])
    beside = a_run(tmp_path / "beside", schedule=Ramp(5), plugins=[Everything()])
    assert beside[0] == alone[0]
    assert difference(beside[1], alone[1]) == []


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do; a sync with the host is an operation too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", [Fixed(2), Ramp(3)])
def test_plug_ins_add_no_operation_to_a_step_and_no_sync(tmp_path, schedule):
    a_run(tmp_path)
    counted = []
    for plugins in ((), tuple(Everything() for _ in range(8))):
        run = Run()
        path = disback.DegradationPath(tmp_path)
        scheduler = disback.TrajectoryScheduler(path, run.teacher, run.fake_score, schedule=schedule, plugins=plugins)
        scheduler.start()
        with Operations() as operations:
            for _ in range(4):
                scheduler.step()
        counted.append(operations.names)
    assert counted[0] == counted[1] != []
    assert all(event[0] in ("swapped", "log") for event in plugins[0].heard)


def test_order_and_fewer_arguments_are_pluggys():
    heard = []

    def listener(name, **options):
        class Listener:
            @hookimpl(**options)
            def disback_after_node_swapped(self, update, position):
                heard.append((name, update, position))

        return Listener()

    plugins = Plugins(listener("a"), listener("last", trylast=True), listener("first", tryfirst=True), listener("b"))
    plugins.node_swapped(None, 2.0, 3.0, 7)
    assert heard == [("first", 7, 2.0), ("b", 7, 2.0), ("a", 7, 2.0), ("last", 7, 2.0)]


def test_an_argument_with_a_default_is_never_passed_and_its_author_is_told(site, caplog):
    install(site, "theirs", "got = []\n@hookimpl\ndef disback_log(values, step=None):\n    got.append(step)")
    plugins = Plugins()
    plugins.log({}, 7)
    assert sys.modules["disback_theirs_theirs"].got == [None]
    note = "disback_log never gets step: an argument with a default is not passed"
    assert f"the plug-in theirs of disback-theirs 1.0: {note}" in caplog.text
    assert (found(plugins, "theirs").status, found(plugins, "theirs").reason) == ("ready", note)


def test_tracing_names_each_call_and_its_answer(site, monkeypatch, caplog):
    install(site, "theirs", "@hookimpl\ndef disback_should_advance(position):\n    return position > 1")
    monkeypatch.setenv("DISBACK_TRACE_PLUGINS", "1")
    Plugins().should_advance(None, 3.0, 5, 0.25)
    assert "theirs: disback_should_advance(None, 3.0, 5, 0.25) -> True" in caplog.text


# -- what a script registers ------------------------------------------------------------------------------------------


def test_a_registered_plug_in_hears_runs_under_way_until_it_is_taken_out():
    plugins, plugin = Plugins(), Everything()
    unregister = hooks.register(plugin)
    plugins.log({"a": 1}, 1)
    with pytest.raises(OptionError, match="registered already"):
        hooks.register(plugin)
    assert any(listed.name.startswith("Everything at 0x") for listed in plugins.listed())
    unregister()
    unregister()
    plugins.log({"a": 1}, 2)
    assert plugin.heard == [("log", {"a": 1}, 1)]
    assert not any(listed.name.startswith("Everything at 0x") for listed in plugins.listed())


def test_one_that_is_registered_and_passed_is_called_once():
    plugin = Everything()
    unregister = hooks.register(plugin)
    try:
        Plugins(plugin).log({}, 1)
    finally:
        unregister()
    assert len(plugin.heard) == 1


@pytest.mark.parametrize("way", [hooks.register, Plugins])
def test_what_is_no_plug_in_is_refused(way):
    class Misspelt:
        @hookimpl
        def disback_logs(self, values, step):
            pass

    for plugin, reason in (
        (object(), "it implements no hook"),
        (Misspelt(), "disback_logs is no hook (disback_log is)"),
        (Everything, "it is a class, not a module or an instance"),
    ):
        with pytest.raises(OptionError) as caught:
            way(plugin)
        assert reason in caught.value.found


# -- when a node is left ----------------------------------------------------------------------------------------------


class Rule:
    """Answers by the update, as a rule would."""

    def __init__(self, **answers):
        self.answers = {int(update.removeprefix("at_")): answer for update, answer in answers.items()}
        self.asked = []

    @hookimpl
    def disback_should_advance(self, scheduler, position, updates_in_node, signal):
        self.asked.append((scheduler.generator_updates, position, updates_in_node, signal))
        return self.answers.get(scheduler.generator_updates)


def visited(run, handle, steps):
    positions = []
    for _ in range(steps):
        positions.append(int(handle.position))
        run.step()
    return positions


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({}, [2, 2, 1, 1, 1, 0, 0, 0, 0]),
        ({"at_1": True}, [2, 1, 1, 1, 0, 0, 0, 0, 0]),
        ({"at_2": False}, [2, 2, 2, 1, 1, 1, 0, 0, 0]),
        ({"at_2": False, "at_3": False, "at_4": True}, [2, 2, 2, 2, 1, 1, 1, 0, 0]),
        ({"at_1": False}, [2, 2, 1, 1, 1, 0, 0, 0, 0]),  # it would have stayed anyway
        ({"at_1": True, "at_2": True}, [2, 1, 0, 0, 0, 0, 0, 0, 0]),
        ({f"at_{i}": False for i in range(1, 9)}, [2] * 9),
    ],
)
def test_a_plug_in_keeps_or_ends_a_node_and_the_rest_of_the_plan_follows(tmp_path, answers, expected):
    run, rule = Run(), Rule(**answers)
    with disback.attach(
        **run.roles(), path=tmp_path, record=6, every=2, schedule=Fixed(2, 3), plugins=(rule,)
    ) as handle:
        run.steps(6)
        assert visited(run, handle, 9) == expected
        for update, position, in_node, _ in rule.asked:
            assert position == expected[update - 1] >= 1
            assert in_node == expected[:update].count(position)
        assert handle.phase == ("done" if expected[-1] == 0 else "backtracking")


def test_the_loops_signal_reaches_the_rule(tmp_path):
    run, rule = Run(), Rule()
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Fixed(3), plugins=(rule,)) as handle:
        run.steps(3)
        handle.signal = 0.5
        run.step()
    assert [asked[3] for asked in rule.asked] == [None, 0.5]


@pytest.mark.parametrize("schedule", [Ramp(4), "warm"])
def test_nobody_is_asked_where_the_teacher_stands_on_no_node(tmp_path, schedule):
    run, rule = Run(), Rule(at_1=False, at_2=True)
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule=schedule, plugins=(rule,)):
        run.steps(9)
    assert rule.asked == []


def test_an_evaluation_does_not_change_what_a_rule_sees(tmp_path):
    seen = []
    for evaluate in (False, True):
        run, rule = Run(), Rule(at_2=False)
        options = {"record": 4, "every": 2, "schedule": Fixed(2), "plugins": (rule,)}
        with disback.attach(**run.roles(), path=tmp_path / str(evaluate), **options) as handle:
            run.steps(5)
            if evaluate:
                with handle.original_teacher():
                    run.step()
                with handle.original_teacher():
                    pass
            run.steps(4 - evaluate)
            seen.append(rule.asked)
    assert seen[0] == seen[1] == [(1, 1.0, 1, None), (2, 1.0, 2, None), (3, 1.0, 3, None)]


@pytest.mark.parametrize("moment", range(7, 15))
def test_a_run_that_a_rule_overruled_resumes_bit_for_bit(tmp_path, moment):
    answers = {"at_1": True, "at_4": False, "at_5": False}

    def options(folder):
        rule = Rule(**answers)
        return {"path": tmp_path / folder, "record": 6, "every": 2, "schedule": Fixed(2, 3), "plugins": (rule,)}

    whole = Run()
    with disback.attach(**whole.roles(), **options("whole")) as handle:
        whole.steps(15)
        expected, end = whole.checkpoint(), handle.state_dict()
    first = Run()
    handle = disback.attach(**first.roles(), **options("split"))
    first.steps(moment)
    saved, state = first.checkpoint(), handle.state_dict()
    late = Run()
    with disback.attach(**late.roles(), **options("split")) as resumed:
        late.load(saved)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        late.steps(15 - moment)
        assert difference(late.checkpoint(), expected) == []
        assert resumed.state_dict() | {"path": "", "nodes": ""} == end | {"path": "", "nodes": ""}


RANK = """
import json, sys
import torch.distributed as dist
from disback_plugin.errors import PluginError
from disback_plugin.hooks import Plugins

dist.init_process_group("gloo")
rank = dist.get_rank()
if rank == 0:  # without such a plug-in nothing is exchanged: the other rank is not there
    assert Plugins("no:theirs").should_advance(None, 1.0, 1, None) is None
plugins, answers = Plugins(), []
for updates in (1, 2, 3):
    answers.append(plugins.should_advance(None, 1.0, updates, None))
answers.append([plugin.reason for plugin in plugins.listed() if plugin.name == "theirs"])
try:
    Plugins("theirs").should_advance(None, 1.0, 2, None)
except PluginError as error:
    answers.append(str(error))
open(f"{sys.argv[1]}/rank{rank}.json", "w").write(json.dumps(answers))
dist.barrier()
dist.destroy_process_group()
"""


def test_ranks_leave_a_node_together_and_drop_a_rule_together_though_one_alone_failed(site, tmp_path):
    rule = """
        import os
        @hookimpl
        def disback_should_advance(updates_in_node):
            if updates_in_node == 2 and os.environ["RANK"] == "1":
                raise ValueError("oops")
            return os.environ["RANK"] == "0"  # the ranks do not even agree
    """
    install(site, "theirs", textwrap.dedent(rule))
    (tmp_path / "rank.py").write_text(RANK)
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(site)}
    out = subprocess.run(
        [*launch, tmp_path / "rank.py", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first[:3] == second[:3] == [True, True, None]
    assert first[3] == ["RuntimeError in disback_should_advance: on rank 1, ValueError: oops"]
    assert second[3] == ["ValueError in disback_should_advance: oops"]
    assert all("theirs of disback-theirs 1.0 broke" in asked and "oops" in asked for asked in (first[4], second[4]))
