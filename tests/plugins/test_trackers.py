"""The numbers of a run reach accelerate's trackers, or else logging."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from itertools import count
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator, tracking
from accelerate.tracking import GeneralTracker
from worlds import Run

import disback_plugin as disback
from disback_plugin.errors import OptionError, PluginError
from disback_plugin.plugins import Trackers, log_reader


class Memory(GeneralTracker):
    """What a tracker of one's own has to be, as those of wandb and trackio are."""

    name = "memory"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values):
        self.configuration = values

    def log(self, values, step=None, **kwargs):
        self.rows.append((step, dict(values)))


def walk(tmp_path, *plugins):
    run = Run()
    options = {"path": tmp_path / "path", "record": 4, "every": 2, "schedule": "fixed:2"}
    with disback.attach(**run.roles(), **options, plugins=plugins) as handle:
        run.steps(4 + 4)
        return [node.delta_norm for node in handle.path.nodes]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboards_event_files_hold_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    norms = walk(tmp_path, Trackers(accelerator))
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    names = {"position", "node", "gradient", "swap_ms", "delta_norm", "generator_updates", "recording", "agreement"}
    assert set(read) == {f"disback/{name}" for name in names | {"path_bytes", "node_seconds"}}
    logged = log_reader.read(tmp_path / "path.log.jsonl").curves(recording=True)["agreement"]
    assert [value for _, value in read["disback/recording"]] == [*(x for x, _ in logged), 4] == [2, 3, 4, 4]
    assert [value for _, value in read["disback/agreement"]] == pytest.approx([y for _, y in logged])
    assert read["disback/position"] == [(0, 1.0), (2, 0.0)]
    assert read["disback/node"] == [(0, 1.0), (2, 0.0)]
    assert [value for _, value in read["disback/delta_norm"]] == pytest.approx([norms[0], norms[0]])
    assert all(value > 0 for _, value in read["disback/swap_ms"])


def test_any_tracker_of_accelerate_is_told_under_the_step_of_the_loop(tmp_path):
    memory, steps = Memory(), count(100)
    accelerator = Accelerator(cpu=True, log_with=memory)
    accelerator.init_trackers("run", config={"lr": 1.0})
    walk(tmp_path, Trackers(accelerator, step=lambda: next(steps)))
    moves = [(step, row["disback/generator_updates"]) for step, row in memory.rows if "disback/position" in row]
    assert moves == [(104, 0), (105, 2)], "after the three cosines and the end of the recording"


class Service(ModuleType):
    """What accelerate asks of wandb and trackio: `init(project=...)`, whose answer has `log`, and a config.

    As wandb does, it takes no step that is earlier than one before.
    """

    def __init__(self, name):
        super().__init__(name)
        self.rows, self.config, self.project = [], {}, None

    def init(self, project, **kwargs):
        self.project = project
        return self

    def log(self, values, step=None):
        assert all(type(value) in (int, float) for value in values.values())
        assert not self.rows or step >= self.rows[-1][0]
        self.rows.append((step, dict(values)))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize(("name", "kind"), [("wandb", "WandBTracker"), ("trackio", "TrackioTracker")])
def test_wandb_and_trackio_get_plain_numbers_in_the_order_of_steps(name, kind, tmp_path, monkeypatch):
    if not hasattr(tracking, kind):
        pytest.skip(f"this accelerate knows no {name}")
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    accelerator = Accelerator(cpu=True, log_with=getattr(tracking, kind)("project"))
    accelerator.init_trackers("project", config={"lr": 1.0})
    run = Run()
    options = {"path": tmp_path / "path", "record": 10, "every": 5, "schedule": "ramp:2"}
    with disback.attach(**run.roles(), **options, plugins=[Trackers(accelerator)]) as handle:
        for _ in range(14):
            run.step()
            handle.log({"loss": torch.tensor(0.5)})
    accelerator.end_training()
    assert (service.project, service.config["lr"], service.finished) == ("project", 1.0, True)
    assert all(key.startswith("disback/") for _, values in service.rows for key in values)
    positions = [(step, row["disback/position"]) for step, row in service.rows if "disback/position" in row]
    assert [step for step, _ in positions] == [0, 1, 2]
    assert positions[-1] == (2, 0.0)
    assert [step for step, row in service.rows if "disback/loss" in row] == [0] * 10 + [1, 2, 3, 4]


def test_an_accelerator_without_trackers_is_refused():
    with pytest.raises(OptionError, match="init_trackers"):
        Trackers(Accelerator(cpu=True))


def test_a_tracker_that_was_asked_for_and_breaks_raises(tmp_path):
    class Broken(Memory):
        def log(self, values, step=None, **kwargs):
            raise ConnectionError("no network")

    accelerator = Accelerator(cpu=True, log_with=Broken())
    accelerator.init_trackers("run")
    with pytest.raises(PluginError, match="no network"):
        walk(tmp_path, Trackers(accelerator))


@pytest.mark.parametrize("end", ["detached", "error", "done"])
def test_a_run_that_stops_before_its_end_says_how_far_it_came(tmp_path, end):
    run, rows = Run(), []

    class Rows:
        @disback.hookimpl
        def disback_log(self, values, step):
            rows.append((step, dict(values)))

    with (
        suppress(KeyError),
        disback.attach(
            **run.roles(), path=tmp_path / "path", record=4, every=2, schedule="ramp:10", plugins=(Rows(),)
        ) as handle,
    ):
        run.steps(4 + (20 if end == "done" else 5))
        position = handle.position
        if end == "error":
            raise KeyError
    step, last = next((step, row) for step, row in reversed(rows) if "disback/position" in row)
    assert (last["disback/position"], last.get("disback/detached")) == (position, None if end == "done" else 1.0)
    assert (step, "disback/swap_ms" in last) == ((10, True) if end == "done" else (5, False))


def test_without_a_listener_the_numbers_are_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="disback_plugin"):
        walk(tmp_path)
    told = [record.getMessage() for record in caplog.records if "disback/position" in record.getMessage()]
    assert len(told) == 2
    assert told[1].startswith("update 2: {'disback/position': 0.0")


class InOrder(Memory):
    """Ignores values of an earlier step than the last, as Weights & Biases does, and keeps one row a step."""

    name = "wandb"

    def __init__(self):
        super().__init__()
        self.run, self.metrics, self.step, self.dropped = self, [], 0, []

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values, step=None, **kwargs):
        at = self.step if step is None else step
        if at < self.step:
            self.dropped.append((step, values))
            return
        self.rows.append((at, dict(values)))
        self.step = at + (step is None)


LOOPS = {
    "every iteration": lambda tracker, iteration: tracker.log({"loss": 1.0}, step=iteration),
    "without a step": lambda tracker, iteration: tracker.log({"loss": 1.0}),
    "now and then, in a unit of its own": lambda tracker, i: i % 10 or tracker.log({"loss": 1.0}, step=i // 10),
    "never": lambda tracker, iteration: None,
}


@pytest.mark.parametrize("report", LOOPS.values(), ids=LOOPS)
def test_a_tracker_that_wants_steps_in_order_loses_neither_our_reports_nor_the_loops(tmp_path, report):
    tracker, run = InOrder(), Run()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("run")
    options = {"path": tmp_path / "path", "record": 10, "every": 5, "schedule": "ramp:5"}
    with disback.attach(**run.roles(), **options, plugins=(disback.Trackers(accelerator),)) as handle:
        for iteration in range(1, 41):
            run.step()
            report(accelerator.trackers[0], iteration)
        assert handle.phase == "done"
    assert tracker.dropped == []
    moves = [row["disback/generator_updates"] for _, row in tracker.rows if "disback/position" in row]
    assert moves == [0, 1, 2, 3, 4, 5]
    assert tracker.metrics == [("disback/*", "disback/generator_updates")]


def test_a_tracker_that_takes_any_step_gets_generator_updates(tmp_path):
    memory = Memory()
    accelerator = Accelerator(cpu=True, log_with=memory)
    accelerator.init_trackers("run")
    log = memory.log
    walk(tmp_path, Trackers(accelerator))
    assert memory.log == log, "nothing is put around it"
    assert [step for step, row in memory.rows if "disback/position" in row] == [0, 2]


def test_the_names_of_the_first_version_are_still_found():
    assert disback.Trackers is Trackers
    assert disback.RunLog is not None
    assert disback.OriginalFeatures is not None
    assert disback.MaskedSamples is not None
    assert "Trackers" not in dir(disback)
