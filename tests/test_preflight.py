"""What a preflight says, and that it leaves everything as it found it."""

from __future__ import annotations

import json
import os
import sys
import tempfile

import pytest
import torch
from torch import nn
from worlds import Run, Score, clone, difference

import disback_plugin as disback
from disback_plugin.cli import main
from disback_plugin.errors import MismatchError, OptionError, TrainingError
from disback_plugin.outlook import MEASURED, NEAR, advice
from disback_plugin.schedules import Auto


def all_of(run):
    gradients = {
        f"{role}.{name}": None if weight.grad is None else weight.grad.clone()
        for role in ("teacher", "fake_score")
        for name, weight in getattr(run, role).named_parameters()
    }
    return run.checkpoint() | {
        "teacher": clone(dict(run.teacher.state_dict())),
        "gradients": {name: "none" if gradient is None else gradient for name, gradient in gradients.items()},
        "global": torch.get_rng_state(),
        "modes": [run.teacher.training, run.fake_score.training],
    }


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("returns_loss", [True, False])
def test_everything_is_bit_for_bit_as_it_was(steps, returns_loss):
    run = Run(seed=1)
    run.steps(steps)

    def fake_step():
        torch.randn(3)  # from the global stream, as most trainers draw
        run.fake_step()
        return run.fake_score.left.weight.detach().square().sum() + 1 if returns_loss else None

    before, stream = all_of(run), run.stream.get_state()
    found = disback.preflight(run.teacher, run.fake_score, fake_step)
    run.stream.set_state(stream)  # the user's own
    assert difference(all_of(run), before) == []
    assert (found.excess_loss is not None) is returns_loss


def test_gradients_that_were_there_stay_the_same_tensors():
    run = Run()
    run.step()
    kept = {name: (weight.grad, weight.grad.clone()) for name, weight in run.fake_score.named_parameters()}
    disback.preflight(run.teacher, run.fake_score, run.fake_step)
    for name, weight in run.fake_score.named_parameters():
        assert weight.grad is kept[name][0]
        assert torch.equal(weight.grad, kept[name][1])


def test_what_an_optimizer_holds_stays_the_same_objects():
    run, rate = Run(), torch.tensor(0.01)
    run.optimizer_f = torch.optim.Adam(run.fake_score.parameters(), lr=rate, foreach=False)
    run.step()
    moments = {weight: dict(state) for weight, state in run.optimizer_f.state.items()}
    before = clone(run.optimizer_f.state_dict())
    disback.preflight(run.teacher, run.fake_score, run.fake_step)
    assert run.optimizer_f.param_groups[0]["lr"] is rate
    for weight, state in run.optimizer_f.state.items():
        assert all(state[name] is tensor for name, tensor in moments[weight].items())
    assert difference(run.optimizer_f.state_dict(), before) == []


def test_an_optimizer_that_keeps_something_beside_its_weights_states_is_put_back():
    run = Run()

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state["steps"] = self.state.get("steps", 0) + 1

    run.optimizer_f = Counting(run.fake_score.parameters(), lr=0.01, momentum=0.9)
    run.step()
    disback.preflight(run.teacher, run.fake_score, run.fake_step)
    assert run.optimizer_f.state["steps"] == 1


def test_losses_that_may_be_negative_give_no_excess_loss():
    run = Run()

    def fake_step():
        run.fake_step()
        return -1.0

    assert disback.preflight(run.teacher, run.fake_score, fake_step).excess_loss is None


def test_a_seed_that_cuda_has_not_used_yet_is_still_the_users(tmp_path):
    def queued():
        calls = torch.cuda._lazy_seed_tracker.get_calls()
        return [cell.cell_contents for call in calls if call for cell in call[0].__closure__]

    def arguments():
        run = Run()
        return run.teacher, {
            "sample": lambda: run.generator(torch.randn(8, 2)).detach(),
            "loss": lambda net, x_0: (net(x_0, torch.ones(1)) - x_0).square().mean(),
        }

    (teacher, pair), (other, again) = arguments(), arguments()
    torch.manual_seed(123)
    before = queued()
    disback.preflight(teacher, **pair, iterations=5)
    disback.record(other, **again, path=tmp_path, iterations=2, every=2)
    assert queued() == before


def test_a_discriminator_that_trains_in_the_same_step_is_put_back():
    run, other = Run(), nn.Linear(2, 1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)

    def fake_step():
        run.fake_step()
        optimizer.zero_grad()
        other(torch.ones(4, 2)).sum().backward()
        optimizer.step()

    before = clone(other.state_dict())
    disback.preflight(run.teacher, run.fake_score, fake_step)
    assert difference(clone(other.state_dict()), before) == []
    assert not optimizer.state


def test_it_records_what_attach_would_and_plans_what_auto_does(tmp_path):
    run = Run(seed=1)
    found = disback.preflight(run.teacher, run.fake_score, run.fake_step, iterations=60)
    again = Run(seed=1)
    with disback.attach(**again.roles(), path=tmp_path, record=60, every=60) as handle:
        while handle.phase == "recording":
            again.fake_step()
            again.optimizer_g.step()
        manifest = handle.path.manifest
        ours = {name: getattr(found, name) for name in ("fitted", "recorded", "node_bytes")}
        # Eight losses were asked for before, on other noise: the updates may differ by a little.
        assert abs(ours["recorded"] - manifest.iterations) <= 10
        assert abs(ours["node_bytes"] - handle.path.nodes[0].bytes) < 0.1 * ours["node_bytes"]
    assert (found.walk_updates, found.whole_updates) == (found.fitted or 60, 3 * (found.fitted or 60))
    assert found.whole_updates == Auto(found.fitted or 60).horizon(1)


def test_the_recording_has_twice_the_learning_rate_until_s_phi_is_fitted_and_the_losses_have_not():
    run, rates = Run(seed=1), []
    own = run.optimizer_f.param_groups[0]["lr"]
    run.optimizer_f.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    found = disback.preflight(run.teacher, run.fake_score, run.fake_step)
    assert [rate for rate in rates if rate != own] == [2 * own] * (found.fitted // 2)
    assert rates[0] == rates[-1] == run.optimizer_f.param_groups[0]["lr"] == own


def test_so_it_has_without_a_loop_of_the_trainers_own(monkeypatch):
    module, rates = sys.modules["torch.optim.adam"], []
    adam_step = module.adam

    def adam(*args, lr, **options):
        rates.append(round(lr / 0.05, 6))
        return adam_step(*args, lr=lr, **options)

    monkeypatch.setattr(module, "adam", adam)
    found = disback.preflight(**standalone(2.0))
    assert rates == [2.0] * (found.fitted // 2) + [1.0] * (found.recorded - found.fitted // 2)


def standalone(shift):
    """A teacher of unit noise about 0, and a student at `shift`."""
    teacher = nn.Linear(2, 2)
    nn.init.eye_(teacher.weight)
    with torch.no_grad():
        teacher.weight.mul_(0.5)
        teacher.bias.zero_()
    return {
        "teacher": teacher,
        "sample": lambda: torch.randn(256, 2) + shift,
        "loss": lambda net, x_0: (net(x_0 + torch.randn_like(x_0)) - x_0).square().mean(),
        "learning_rate": 0.05,
    }


def test_the_excess_loss_is_nothing_for_a_student_of_the_teachers_data_and_grows_with_the_distance():
    near, far = (disback.preflight(**standalone(shift)) for shift in (0.0, 4.0))
    assert abs(near.excess_loss) < 0.1
    # (shift / 2)^2 = 4 beside the loss of 0.5 that no network can avoid.
    assert 5 < far.excess_loss < 9
    assert near.advice != far.advice


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    networks, global_state = standalone(1.0), torch.get_rng_state()
    disback.preflight(**networks)
    assert os.listdir(tmp_path) == []
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize(
    ("excess", "group"), [(0.0, "near"), (NEAR - 0.01, "near"), (NEAR, "far"), (20.0, "far"), (None, None)]
)
def test_the_advice_says_what_was_measured_and_no_more(excess, group):
    text = advice(excess)
    regimes, low, high = MEASURED[group] if group else (20, 0.83, 1.65)
    assert f"{regimes} regimes measured" in text
    assert f"{low:.2f} to {high:.2f} times" in text
    assert "Nothing that a recording shows says where" in text


def test_of_a_recording_that_is_not_fitted_nothing_is_said_but_that():
    run = Run()
    for group in run.optimizer_f.param_groups:
        group["lr"] = 1e-7
    found = disback.preflight(run.teacher, run.fake_score, run.fake_step, iterations=10)
    assert found.fitted is None
    assert found.advice.startswith("Nothing can be said: s' was not fitted")


def test_wrong_use_is_one_line_and_changes_nothing():
    run, narrow = Run(), Score(width=4)
    before = all_of(run)
    with pytest.raises(OptionError, match="one of the two pairs"):
        disback.preflight(run.teacher, run.fake_score, loss=lambda net, x: x.sum())
    with pytest.raises(OptionError, match="iterations=2"):
        disback.preflight(run.teacher, run.fake_score, run.fake_step, iterations=2)
    with pytest.raises(MismatchError):
        disback.preflight(run.teacher, narrow, run.fake_step)
    with pytest.raises(TrainingError, match="did not write to the fake score"):
        disback.preflight(run.teacher, run.fake_score, lambda: None)
    assert difference(all_of(run), before) == []


def test_a_step_that_raises_leaves_everything_as_it_was():
    run, calls = Run(), []

    def fake_step():
        run.fake_step()
        calls.append(1)
        if len(calls) == 12:
            raise RuntimeError("out of data")

    before, stream = all_of(run), run.stream.get_state()
    with pytest.raises(RuntimeError, match="out of data"):
        disback.preflight(run.teacher, run.fake_score, fake_step)
    run.stream.set_state(stream)
    assert difference(all_of(run), before) == []


BUILD = """
import torch
from torch import nn

def build():
    teacher = nn.Linear(2, 2)
    loss = lambda net, x_0: (net(x_0 + torch.randn_like(x_0)) - x_0).square().mean()
    return {"teacher": teacher, "sample": lambda: torch.randn(64, 2), "loss": loss}
"""


def test_the_command_says_it_in_lines_and_in_json(tmp_path, monkeypatch, capsys):
    (tmp_path / "preflight_networks.py").write_text(BUILD)
    monkeypatch.chdir(tmp_path)
    command = ["preflight", "preflight_networks:build", "--learning-rate", "0.05"]
    assert main(command) == 0
    lines = capsys.readouterr().out
    assert "a move of the teacher takes" in lines
    assert "Nothing that a recording shows says where in between." in lines
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == 6
    assert found["whole_updates"] == 3 * found["walk_updates"]
    assert os.listdir(tmp_path) in (["preflight_networks.py"], ["__pycache__", "preflight_networks.py"])
