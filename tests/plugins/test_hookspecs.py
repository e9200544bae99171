"""The hooks are called in order, with the documented arguments, and plug-ins do not change a run."""

from __future__ import annotations

import pytest
import torch
from sites import WELL, a_run, install
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import Run, difference

import disback_plugin as disback
from disback_plugin import hookimpl
from disback_plugin.errors import OptionError, PluginError
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.schedules import Fixed, Ramp


class Everything:
    """Records the calls of all hooks."""

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


def test_a_run_calls_every_hook_in_order(tmp_path):
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


def test_original_teacher_calls_no_hook_and_a_move_inside_it_is_reported_after_it(tmp_path):
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


def test_a_plug_in_is_called_for_a_move_although_another_one_failed_at_that_move(tmp_path):
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


def test_detaching_early_and_resuming_call_the_hook_for_the_move(tmp_path):
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


def test_a_reused_path_does_not_call_the_recording_hooks(tmp_path):
    a_run(tmp_path)
    plugin = Everything()
    a_run(tmp_path, plugins=(plugin,))
    assert {event[0] for event in plugin.heard} == {"swapped", "log"}


def test_the_two_stages_by_hand_call_the_same_hooks(tmp_path):
    plugin, run = Everything(), Run()
    path = disback.record(
        run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=2, every=1, plugins=[plugin]
    )
    assert [event for event in plugin.heard if event[0] != "log"] == [
        ("recorded", 1),
        ("recorded", 2),
        ("completed", 2),
    ]
    logged = [event[1] for event in plugin.heard if event[0] == "log"]
    assert [values["disback/recording"] for values in logged if "disback/agreement" in values] == [2], "one cosine"
    assert [values["disback/recording"] for values in logged if "disback/path_bytes" in values] == [2], "at the end"
    scheduler = disback.TrajectoryScheduler(path, run.teacher, run.fake_score, schedule=Fixed(1), plugins=[plugin])
    scheduler.start()
    scheduler.step()
    scheduler.restore_teacher()
    assert [event[1:] for event in plugin.heard if event[0] == "swapped"] == [(0.0, 1.0, 0), (1.0, 0.0, 1)]


def test_every_process_calls_the_hook_for_a_move_and_only_the_main_process_logs(tmp_path, monkeypatch):
    a_run(tmp_path)
    run, plugin = Run(), Everything()
    path = disback.DegradationPath(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 1)
        patch.setattr(torch.distributed, "get_rank", lambda: 1)
        scheduler = disback.TrajectoryScheduler(path, run.teacher, run.fake_score, schedule=Fixed(1), plugins=[plugin])
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
    for given in ((), tuple(Everything() for _ in range(8))):
        run = Run()
        path = disback.DegradationPath(tmp_path)
        scheduler = disback.TrajectoryScheduler(path, run.teacher, run.fake_score, schedule=schedule, plugins=given)
        scheduler.start()
        with Operations() as operations:
            for _ in range(4):
                scheduler.step()
        counted.append(operations.names)
    assert counted[0] == counted[1] != []
    assert all(event[0] in ("swapped", "log") for event in given[0].heard)


def test_pluggy_orders_plug_ins_and_passes_the_arguments_that_they_name():
    heard = []

    def listener(name, **options):
        class Listener:
            @hookimpl(**options)
            def disback_after_node_swapped(self, update, position):
                heard.append((name, update, position))

        return Listener()

    plugins = PluginManager(
        listener("a"), listener("last", trylast=True), listener("first", tryfirst=True), listener("b")
    )
    plugins.call("disback_after_node_swapped", scheduler=None, position=2.0, previous=3.0, update=7)
    assert heard == [("first", 7, 2.0), ("b", 7, 2.0), ("a", 7, 2.0), ("last", 7, 2.0)]


def test_tracing_names_each_call_and_its_answer(site, monkeypatch, caplog):
    install(site, "theirs", "@hookimpl\ndef disback_should_advance(position):\n    return position > 1")
    monkeypatch.setenv("DISBACK_TRACE_PLUGINS", "1")
    arguments = {"scheduler": None, "position": 3.0, "updates_in_node": 5, "signal": 0.25}
    PluginManager().should_advance(**arguments)
    assert f"theirs: disback_should_advance {arguments} -> True" in caplog.text


def test_an_object_that_is_not_a_plug_in_is_refused():
    class Misspelt:
        @hookimpl
        def disback_logs(self, values, step):
            pass

    for plugin, reason in (
        (object(), "it implements no hook"),
        (Misspelt(), "unknown hook 'disback_logs'"),
        (Everything, "it is a class, not a module or an instance"),
    ):
        with pytest.raises(OptionError) as caught:
            PluginManager(plugin)
        assert reason in caught.value.found
