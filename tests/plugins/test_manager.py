"""Installed plug-ins are found through their entry points, and a broken one is isolated from the run."""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sites import KNOWS, MISTAKES, WELL, Dmd2Trainer, a_run, found, install
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin import hookimpl
from disback_plugin.errors import OptionError, PluginError, RoleError
from disback_plugin.plugins import PluginManager
from disback_plugin.plugins.hookspecs import Specs
from disback_plugin.schedules import Fixed
from disback_plugin.weights.network import ScoreNetwork


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_plug_in_does_not_change_the_run_and_is_named_with_its_distribution(site, tmp_path, caplog, mistake):
    plain = a_run(tmp_path / "plain")
    source, reason = MISTAKES[mistake]
    install(site, "theirs", source)
    beside = a_run(tmp_path / "beside")
    assert beside[0] == plain[0]
    assert difference(beside[1], plain[1]) == []
    assert f"theirs of disback-theirs 1.0 is broken and left out ({reason}" in caplog.text
    plugin = found(PluginManager(), "theirs")
    assert plugin.status == "broken"
    assert plugin.reason.startswith(reason)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_plug_in_that_was_asked_for_raises_and_nothing_is_written(site, tmp_path, mistake):
    source, reason = MISTAKES[mistake]
    install(site, "theirs", source)
    run = Run()
    with pytest.raises(PluginError) as caught:
        disback.attach(**run.roles(), path=tmp_path / "path", plugins=("theirs",))
    assert "theirs of disback-theirs 1.0" in caught.value.found
    assert reason in caught.value.found
    assert "no:theirs" in caught.value.cure
    assert not (tmp_path / "path").exists()


EVENTS = [name for name in vars(Specs) if name.startswith("disback_") and name != "disback_adapter"]


@pytest.mark.parametrize("hook", EVENTS)
def test_a_plug_in_that_raises_in_a_hook_is_left_out_of_the_rest_of_the_run(site, tmp_path, caplog, hook):
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
    assert re.match(rf"found the plug-in Theirs of the script broken \(ValueError in {hook}: oops\)", message)
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
    assert found(PluginManager("no:theirs"), "theirs").status == "blocked"


def test_a_run_with_a_blocked_adapter_does_not_import_it(site, tmp_path, monkeypatch, capsys):
    from disback_plugin import cli

    module = install(site, "theirs", "print('imported')", group="disback.adapters")
    (tmp_path / "script.py").write_text("print('ran')")
    monkeypatch.setattr(sys, "argv", ["disback"])
    options = ["run", "--adapter", "theirs", "--path", str(tmp_path / "path"), str(tmp_path / "script.py")]
    assert cli.main(["-p", "no:theirs", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "found --adapter theirs, which is blocked" in printed.err
    assert module not in sys.modules
    assert cli.main(options) == 1
    assert (
        "found the plug-in theirs of disback-theirs 1.0 broken (ValueError: it implements no hook)"
        in capsys.readouterr().err
    )


def test_without_autoload_only_what_is_named_takes_part(site, tmp_path, monkeypatch):
    modules = [install(site, name, WELL) for name in ("one", "two", "three")]
    monkeypatch.setenv("DISBACK_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("DISBACK_PLUGINS", "three")
    a_run(tmp_path, plugins=("one",))
    assert [module in sys.modules for module in modules] == [True, False, True]
    with pytest.raises(RoleError, match=r"asked \[\]"):
        PluginManager().find_adapter(Dmd2Trainer())
    assert PluginManager().find_adapter(Dmd2Trainer(), "dmd2")


def test_a_name_that_is_not_installed_or_both_asked_for_and_blocked_is_refused(site):
    install(site, "theirs", WELL)
    with pytest.raises(OptionError, match=r"found plug-in 'their'; expected one of \[.*'dmd2', .*'theirs'.*\]"):
        PluginManager("their")
    with pytest.raises(OptionError, match="plug-in 'theirs', which is blocked; expected one of"):
        PluginManager("theirs", "no:theirs")
    with pytest.raises(OptionError, match="adapter='dmd2', which is blocked"):
        PluginManager("no:dmd2").find_adapter(Dmd2Trainer(), "dmd2")
    with pytest.raises(OptionError, match=r"plugins=\(plugin,\)"):
        PluginManager.of("theirs")


def test_of_two_plug_ins_with_one_name_the_second_is_listed_as_broken(site):
    install(site, "dmd2", "raise RuntimeError('imported')", group="disback.adapters", distribution="somebody-else")
    assert PluginManager().find_adapter(Dmd2Trainer(), "dmd2").teacher
    both = [plugin for plugin in PluginManager().list_plugins() if plugin.name == "dmd2"]
    assert [(plugin.distribution, plugin.status) for plugin in both] == [
        ("disback-plugin", "installed"),
        ("somebody-else", "broken"),
    ]
    assert both[1].reason.startswith("its name is taken by dmd2 of disback-plugin ")


def test_an_unreadable_distribution_does_not_hide_the_others(site):
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
    plugins = PluginManager()
    assert found(plugins, "theirs").status == "ready"
    assert found(plugins, "dmd2").status == "installed"
    garbage = found(plugins, "garbage")
    assert (garbage.status, garbage.version) == ("broken", "2.0")
    assert garbage.reason.startswith("its entry points cannot be read (")
    assert found(plugins, "unknown").distribution == "an unknown distribution"
    assert found(plugins, "empty").status == "broken"


def test_a_distribution_that_is_on_the_path_twice_is_listed_once(site, tmp_path, monkeypatch):
    install(site, "theirs", WELL)
    install(tmp_path, "theirs", "raise RuntimeError('the shadowed one')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(site))
    assert found(PluginManager(), "theirs").status == "ready"


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
def test_every_listed_plug_in_is_ready_blocked_or_broken_after_loading(data, kinds):
    with several(kinds) as names:
        blocked = data.draw(st.sets(st.sampled_from(sorted(names)))) if names else set()
        plugins = PluginManager(*(f"no:{name}" for name in blocked), autoload=False)
        listed = {plugin.name for plugin in plugins.list_plugins()}
        assert listed == names.keys() | {p.name for p in PluginManager(autoload=False).list_plugins()}
        assert not any(module in sys.modules for _, module in names.values())
        checked = plugins.list_plugins(load=True)
        by_status = {}
        for plugin in checked:
            by_status.setdefault(plugin.status, set()).add(plugin.name)
        assert len(checked) == len(listed) == sum(map(len, by_status.values()))
        assert by_status.keys() <= {"ready", "blocked", "broken"}
        assert by_status.get("blocked", set()) == blocked
        well = {name for name, (kind, _) in names.items() if kind in ("well", "adapter")}
        assert by_status.get("ready", set()) & names.keys() == well - blocked
        assert by_status.get("broken", set()) == names.keys() - well - blocked
