"""Warnings at the start of a run that would fail silently; a sound run has none."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.errors import PathError, StateError
from disback_plugin.path.manifest import Recording
from disback_plugin.plugins.log_reader import read
from disback_plugin.schedules import Auto

PLAN = {"record": 3, "every": 3, "schedule": "ramp:4"}


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_sound_run_has_no_warning(tmp_path, caplog):
    with disback.attach(**(run := Run()).roles(), path=tmp_path / "path", **PLAN) as handle:
        run.steps(5)
        checkpoint, state = run.checkpoint(), handle.state_dict()
    resumed = Run()
    with disback.attach(**resumed.roles(), path=tmp_path / "path", **PLAN) as handle:
        resumed.load(checkpoint)
        handle.load_state_dict(state)
        resumed.steps(5)
    again = Run()
    again.load(checkpoint)
    with disback.attach(**again.roles(), path=tmp_path / "path", **PLAN, state=state):
        again.steps(5)
    assert warnings_in(caplog) == []


def test_a_run_that_continues_without_its_state_is_warned_how_far_the_earlier_one_came(tmp_path, caplog):
    with disback.attach(**(run := Run()).roles(), path=tmp_path / "path", **PLAN):
        run.steps(5)
    with disback.attach(**(run := Run()).roles(), path=tmp_path / "path", **PLAN):
        run.steps(3)
    (message,) = warnings_in(caplog)
    assert "came to generator update 2 at least, and here one begins" in message
    assert "handle.load_state_dict(state)" in message


@pytest.mark.parametrize("node", [0, 1, 2, 3])
def test_a_teacher_from_a_checkpoint_of_backtracking_is_recognised_and_set_back(node, tmp_path, caplog):
    plan = {"path": tmp_path / "path", "record": 3, "every": 1, "schedule": "ramp:4"}
    with disback.attach(**(run := Run()).roles(), **plan) as handle:
        run.steps(4)
        path = handle.path
    again = Run()
    again.teacher.load_state_dict(path[node])
    caplog.clear()
    with disback.attach(**again.roles(), **plan):
        again.steps(1)
    held = [message for message in warnings_in(caplog) if "the teacher held node" in message]
    assert len(held) == (node > 0)
    assert all(f"held node {node} of" in message for message in held)
    assert all(torch.equal(value, path[0][name]) for name, value in again.teacher.state_dict().items())


def test_a_teacher_that_no_node_equals_or_of_an_unfinished_path_is_another(tmp_path):
    plan = {"path": tmp_path / "path", "record": 4, "every": 1}
    with disback.attach(**(run := Run()).roles(), **plan) as handle:
        run.steps(2)
        first = handle.path[1]
    again = Run()
    again.teacher.load_state_dict(first)
    with pytest.raises(PathError, match="another teacher"):
        disback.attach(**again.roles(), **plan)


def test_a_trained_fake_score_is_not_overwritten_without_a_warning(tmp_path, caplog):
    run = Run()
    run.steps(3)
    with disback.attach(**run.roles(), path=tmp_path / "path", **PLAN):
        pass
    assert "the fake score holds other weights than the teacher, and begins at node 0" in warnings_in(caplog)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_fake_score_of_another_precision_or_with_other_running_statistics_counts_as_the_teacher(
    tmp_path, caplog, dtype
):
    run = Run(dtype=dtype)
    run.fake_score.load_state_dict(run.teacher.state_dict())
    run.fake_score.train()(torch.randn(8, 2), torch.ones(1))
    disback.attach(**run.roles(), path=tmp_path / "path", **PLAN).detach()
    assert not any("other weights" in message for message in warnings_in(caplog))


def test_backtracking_after_a_recording_at_another_learning_rate_has_a_warning(tmp_path, caplog):
    def recorded(rate):
        run = Run()
        disback.record(
            run.teacher,
            sample=lambda: run.generator(torch.randn(8, 2)).detach(),
            loss=lambda net, x_0: (net(x_0, torch.ones(1)) - x_0).square().mean(),
            path=tmp_path / f"{rate}",
            iterations=10,
            every=10,
            learning_rate=rate,
        )
        return run, tmp_path / f"{rate}"

    run, path = recorded(1e-5)
    rate = run.optimizer_f.param_groups[0]["lr"]
    for schedule, expected in (("auto", 1), (Auto(5), 1), ("ramp:5", 0)):
        caplog.clear()
        disback.attach(**run.roles(), path=path, schedule=schedule, plugins=("no:run_log",)).detach()
        assert sum("was recorded at a learning rate of 1e-05" in message for message in warnings_in(caplog)) == expected
    run, path = recorded(rate)
    caplog.clear()
    group = run.optimizer_f.param_groups[0]
    for more in ({}, {"lr": 0.0}, {"lr": rate / 25, "max_lr": rate}, {"lr": rate / 100, "initial_lr": rate}):
        group |= more  # as a scheduler leaves it
        disback.attach(**run.roles(), path=path).detach()
    group["lr"] = group["max_lr"] = rate
    run.optimizer_f.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, "max_lr": 1.0})
    disback.attach(**run.roles(), path=path).detach()
    assert not any("was recorded at" in message for message in warnings_in(caplog))


def test_record_restores_the_learning_rate_schedulers_of_its_optimizer(tmp_path):
    run = Run()
    warmup = torch.optim.lr_scheduler.LambdaLR(run.optimizer_f, lambda step: min(1.0, (step + 1) / 50))
    before = warmup.state_dict(), run.optimizer_f.param_groups[0]["lr"]

    def fake_step():
        run.fake_step()
        warmup.step()

    disback.record(run.teacher, run.fake_score, fake_step, path=tmp_path, iterations=7, every=7)
    assert (warmup.state_dict(), run.optimizer_f.param_groups[0]["lr"]) == before


@pytest.mark.parametrize("state", [None, 3, {"a": 1}], ids=repr)
def test_an_object_that_is_no_state_is_refused_first(tmp_path, state):
    handle = disback.attach(**Run().roles(), path=tmp_path / "path", **PLAN)
    with pytest.raises(StateError, match="a state"):
        handle.load_state_dict(state)
    handle.detach()
    if state is not None:
        with pytest.raises(StateError, match="a state"):
            disback.attach(**Run().roles(), path=tmp_path / "new", **PLAN, state=state)
        assert not (tmp_path / "new").exists()


def test_the_error_for_a_schedule_that_does_not_fit_names_the_finished_path(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", record=20, every=20, schedule="warm"):
        run.steps(20)
    with pytest.raises(ValueError, match=r"the one in .*, of 20 updates; .*, or pass another path="):
        disback.attach(**Run().roles(), path=tmp_path / "path", schedule="fixed:5,5", record=200, every=50)


def test_a_lora_fake_score_begins_at_random_without_a_warning(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]), adapter_name="teacher")
    model.add_adapter("fake", peft.LoraConfig(r=2, target_modules=["0", "2"]))
    teacher = disback.ScoreNetwork(model, lora_adapter="teacher")
    fake = disback.ScoreNetwork(model, lora_adapter="fake")
    generator = nn.Linear(2, 2)
    weights = [weight for name, weight in model.named_parameters() if ".fake." in name]
    for weight in weights:
        weight.requires_grad_(True)
    disback.attach(
        teacher=teacher,
        fake_score=fake,
        generator_optimizer=torch.optim.Adam(generator.parameters()),
        fake_score_optimizer=torch.optim.Adam(weights),
        path=tmp_path / "path",
    ).detach()
    assert not any("other weights" in message for message in warnings_in(caplog))


def test_settings_that_a_finished_path_does_not_have_are_a_warning(tmp_path, caplog):
    run = Run()
    disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path / "path", iterations=3, every=3)
    for more, expected in (({}, 0), ({"record": 3, "every": 3}, 0), ({"codec": "exact"}, 1), ({"every": 1}, 1)):
        caplog.clear()
        disback.attach(**Run().roles(), path=tmp_path / "path", **more).detach()
        assert sum("is finished, and used as it is" in message for message in warnings_in(caplog)) == expected


def test_attach_and_record_have_the_defaults_of_recording():
    for recording in (disback.attach, disback.record):
        given = inspect.signature(recording).parameters
        first = "record" if "record" in given else "iterations"
        chosen = [given[name].default for name in (first, "every", "codec", "keep_teacher")]
        assert Recording(*chosen) == Recording()


@pytest.mark.parametrize("asked", [True, False])
def test_without_a_path_a_log_asks_whether_the_fake_score_follows_the_student(tmp_path, asked, caplog):
    log = tmp_path / "baseline.log.jsonl"

    def train(attached):
        run = Run(seed=1)
        options = {"record": 0, "log": log if asked else None}
        with disback.attach(**run.roles(), **options) if attached else nullcontext():
            for _ in range(120):
                for weight in run.fake_score.parameters():
                    weight.grad = torch.ones_like(weight)  # its gradients always agree
                run.optimizer_f.step()
                run.generator_step()
        return clone(dict(run.generator.state_dict()))

    assert difference(train(attached=True), train(attached=False)) == []
    assert any("does not follow the student" in message for message in caplog.messages) is asked
    if asked:
        curves = read(log).curves()
        assert curves["agreement"][-1][1] == pytest.approx(1.0)
        assert [value for _, value in curves["stalled"]] == [1.0]
