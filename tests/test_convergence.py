"""Tests on gradients: when a network is fitted, and when s_phi stalls or diverges while the teacher moves back."""

from __future__ import annotations

import base64
import copy
import json
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import returned
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.convergence import GROWTH, DivergenceMonitor, FitDetector, fitted_after
from disback_plugin.errors import StateError
from disback_plugin.weights.marks import SAMPLE
from disback_plugin.weights.network import ScoreNetwork

numbers = st.floats(-1, 1) | st.just(math.nan)


@given(st.lists(numbers, max_size=80))
def test_fitted_after_does_not_change_with_later_cosines(cosines):
    first = fitted_after(cosines)
    for more in (cosines + [1.0] * 30, cosines + [-1.0] * 7):
        assert first is None or fitted_after(more) == first


@given(length=st.integers(0, 120), agreeing=st.floats(0.11, 1))
def test_gradients_that_agree_are_never_a_fit(length, agreeing):
    assert fitted_after([agreeing] * length) is None


@given(st.integers(0, 60))
def test_a_fit_is_detected_soon_after_the_gradients_stop_agreeing(agreeing):
    cosines = [0.9] * agreeing + [-0.4] * 100
    assert agreeing <= fitted_after(cosines) <= 1.5 * agreeing + 10


def test_cosines_that_are_not_finite_are_ignored():
    assert fitted_after([math.nan] * 40) is None
    assert fitted_after([math.nan, -0.5, -0.5, -0.5, -0.5]) is None
    assert fitted_after([math.nan] + [-0.5] * 8) == 10


def gradients(net, seed):
    draw = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def test_a_small_network_is_sampled_whole():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    fit = FitDetector(ScoreNetwork(net))
    before = None
    expected = []
    for seed in range(4):
        now = gradients(net, seed)
        fit.observe()
        if before is not None:
            expected.append(torch.cosine_similarity(now, before, dim=0).item())
        before = now
    assert fit.cosines() == pytest.approx(expected, abs=1e-6)


def test_a_sample_of_a_large_gradient_estimates_its_cosine():
    net = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 301, bias=False), nn.Linear(301, 7))
    fit = FitDetector(ScoreNetwork(net))
    gradients(net, 0)
    fit.observe()
    first = [parameter.grad.clone() for parameter in net.parameters()]
    gradients(net, 1)
    for parameter, old in zip(net.parameters(), first, strict=True):
        parameter.grad.mul_(0.5).add_(old)  # a true cosine of 1 / sqrt(1.25)
    fit.observe()
    assert fit.cosines() == pytest.approx([0.894], abs=0.03)
    assert len(fit.to_tensor()) <= SAMPLE + 2


def test_the_scale_of_a_loss_changes_nothing():
    net = nn.Linear(40, 40)
    found = []
    for scale in (1.0, 65_536.0):
        fit = FitDetector(ScoreNetwork(net))
        for seed in range(3):
            gradients(net, seed)
            net.weight.grad.mul_(scale)
            net.bias.grad.mul_(scale)
            fit.observe()
        found.append(fit.cosines())
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_detector_continues_from_its_text():
    net = nn.Linear(4, 4)
    whole, interrupted = FitDetector(ScoreNetwork(net)), FitDetector(ScoreNetwork(net))
    for seed in range(6):
        gradients(net, seed)
        whole.observe()
        interrupted.observe()
        text = json.loads(json.dumps(interrupted.to_text()))
        interrupted = FitDetector(ScoreNetwork(net))
        interrupted.load(text)
    assert interrupted.cosines() == whole.cosines()


def test_a_parameter_that_never_has_a_gradient_does_not_matter():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].requires_grad_(False)
    fit = FitDetector(ScoreNetwork(net))
    for _ in range(2):
        net[1].weight.grad, net[1].bias.grad = torch.ones(3, 3), torch.ones(3)
        fit.observe()
    assert fit.cosines() == pytest.approx([1.0])


def test_gradients_that_are_all_zero_are_ignored():
    net = nn.Linear(3, 3)
    fit = FitDetector(ScoreNetwork(net))
    for _ in range(20):
        net.weight.grad, net.bias.grad = torch.zeros(3, 3), torch.zeros(3)
        fit.observe()
    assert fitted_after(fit.cosines()) is None
    assert all(map(math.isnan, fit.cosines()))


def test_a_sparse_gradient_counts_as_zero():
    net = nn.ModuleDict({"table": nn.Embedding(10, 3, sparse=True), "head": nn.Linear(3, 1)})
    fit = FitDetector(ScoreNetwork(net))
    for _ in range(2):
        net.zero_grad()
        net["head"](net["table"](torch.tensor([1, 2]))).sum().backward()
        fit.observe()
    assert fit.cosines() == pytest.approx([1.0])


# -- stalled and diverged ---------------------------------------------------------------------------------------------


def monitor_of(gradients, horizon=60):
    """A monitor that has seen these gradients, each two numbers, and was asked whenever it could be."""
    net = nn.Linear(2, 1, bias=False)
    monitor = DivergenceMonitor(ScoreNetwork(net), horizon)
    for gradient in gradients:
        net.weight.grad = torch.tensor([gradient])
        monitor.observe()
        monitor.new_signs()
    return monitor


def turning(sizes):
    """Gradients of these sizes, each against the one before."""
    return [[size * (-1) ** i, size * (-1) ** i] for i, size in enumerate(sizes)]


@given(st.lists(st.floats(0.2, 5.0), max_size=60))
def test_gradients_that_turn_and_keep_their_size_are_sound(sizes):
    monitor = monitor_of(turning(sizes))
    assert monitor.signs == set()


@given(st.integers(10, 60))
def test_gradients_that_agree_for_two_windows_are_a_stall(count):
    monitor = monitor_of([[1.0, 1.0]] * count)
    assert monitor.signs == {"stalled"}


@pytest.mark.parametrize("worse", [math.nan, math.inf, 1.1 * GROWTH])
def test_gradients_that_grow_or_are_not_finite_are_a_divergence(worse):
    assert monitor_of(turning([1.0] * 5 + [worse] * 5)).signs == {"diverged"}
    assert monitor_of(turning([1.0] * 5 + [worse] * 4)).signs == set()  # the window is not over


def test_a_divergence_stays():
    assert "diverged" in monitor_of(turning([1.0] * 5 + [math.nan] * 5 + [1.0] * 20)).signs


def test_only_the_last_updates_of_a_long_window_are_sampled():
    quiet = turning([1.0] * 5)
    assert monitor_of([*quiet, *turning([1e9] * 44 + [1.0] * 6)], horizon=20_000).signs == set()
    assert monitor_of([*quiet, *turning([1.0] * 44 + [1e9] * 6)], horizon=20_000).signs == {"diverged"}


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 7, 12])
def test_a_monitor_continues_from_its_text(stop):
    stream = torch.Generator().manual_seed(0)
    gradients = (torch.randn(20, 2, generator=stream) + 1).tolist()
    first = monitor_of(gradients[:stop])
    net = nn.Linear(2, 1, bias=False)
    second = DivergenceMonitor(ScoreNetwork(net), 60)
    second.load(json.loads(json.dumps(first.to_text())))
    for gradient in gradients[stop:]:
        net.weight.grad = torch.tensor([gradient])
        second.observe()
        second.new_signs()
    assert second.to_text() == monitor_of(gradients).to_text()


# -- attached ---------------------------------------------------------------------------------------------------------


class DataRun(Run):
    """The fake score predicts x_0: its loss grows without bound as the student runs away."""

    def fake_step(self):
        x_0 = self.generator(self.randn(16, 2)).detach()
        sigma = self.randn(16, 1).exp()
        self.optimizer_f.zero_grad()
        (self.fake_score(x_0 + sigma * self.randn(16, 2), sigma) - x_0).square().mean().backward()
        self.optimizer_f.step()


def attached(run, folder, **options):
    return disback.attach(**run.roles(), path=folder, **({"record": 60, "every": 20} | options))


def record_all(run, handle):
    while handle.phase == "recording":
        run.step()


class Log:
    def __init__(self):
        self.seen = []

    @disback.hookimpl
    def disback_log(self, values, step):
        self.seen += [(name, step) for name in values if name in ("disback/stalled", "disback/diverged")]


def explode(run):
    """From now on each step throws the student far away."""
    for group in run.optimizer_g.param_groups:
        group["lr"] = 100.0


def test_a_divergence_is_logged_once_and_ends_backtracking(tmp_path, caplog):
    run, log = DataRun(seed=1), Log()
    before = clone(dict(run.teacher.state_dict()))
    with attached(run, tmp_path, plugins=(log,)) as handle:
        record_all(run, handle)
        run.steps(5)
        assert handle.position > 0
        explode(run)
        run.steps(10)
        assert (handle.phase, handle.position) == ("done", 0.0)
        assert handle.generator_updates < handle.scheduler.plan.horizon
        assert f"generator update {log.seen[0][1]}  teacher at position 0" in repr(handle)
        assert difference(dict(run.teacher.state_dict()), before) == []
    assert [name for name, _ in log.seen] == ["disback/diverged"]
    (line,) = [message for message in caplog.messages if "thirtyfold" in message]
    assert "lower the generator's learning rate; the teacher is s'_0 for good" in line


def test_a_schedule_without_until_fitted_only_warns_of_a_divergence(tmp_path, caplog):
    run = DataRun(seed=1)
    with attached(run, tmp_path, schedule="fixed:15", record=40) as handle:
        record_all(run, handle)
        run.steps(5)
        explode(run)
        run.steps(5)
        assert handle.position == 1.0
    (line,) = [message for message in caplog.messages if "thirtyfold" in message]
    assert line.endswith("lower the generator's learning rate")


def test_a_fake_score_that_does_not_follow_is_warned_of(tmp_path, caplog):
    run = Run(seed=1)
    with attached(run, tmp_path, schedule="ramp:60", record=5, every=5) as handle:
        record_all(run, handle)
        for _ in range(20):
            for weight in run.fake_score.parameters():
                weight.grad = torch.ones_like(weight)
            run.optimizer_f.step()
            run.generator_step()
    assert [message for message in caplog.messages if "does not follow the student" in message]


def test_a_sound_run_is_not_warned_of(tmp_path, caplog):
    for schedule in ("auto", "ramp:60"):
        run = Run(seed=1)
        with attached(run, tmp_path / schedule.replace(":", ""), schedule=schedule) as handle:
            run.steps(120)
            assert handle.phase == "done"
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize("stop", [1, 6, 9, 14])
def test_a_diverging_run_that_resumes_anywhere_ends_as_the_uninterrupted_one(tmp_path, stop):
    whole = DataRun(seed=1)
    with attached(whole, tmp_path / "path") as handle:
        record_all(whole, handle)
        kept = copy.deepcopy((whole.checkpoint(), handle.state_dict()))
        whole.steps(5)
        explode(whole)
        whole.steps(11)
        ended = handle.state_dict()
    run = DataRun(seed=1)
    run.load(kept[0])
    with attached(run, tmp_path / "path", state=kept[1]) as handle:
        for step in range(16):
            if step == 5:
                explode(run)
            if step == stop:
                checkpoint, state = copy.deepcopy((run.checkpoint(), handle.state_dict()))
                break
            run.step()
    again = DataRun(seed=1)
    again.load(checkpoint)
    with attached(again, tmp_path / "path", state=json.loads(json.dumps(state))) as handle:
        for step in range(stop, 16):
            if step == 5:
                explode(again)
            again.step()
        assert handle.state_dict() == ended
    assert difference(again.checkpoint(), whole.checkpoint()) == []


def test_an_empty_text_is_the_state_before_the_first_update():
    fit, monitor = FitDetector(ScoreNetwork(nn.Linear(2, 1))), monitor_of([])
    for test in (fit, monitor):
        before = test.to_text()
        test.load("")
        assert test.to_text() == before


def test_a_gradient_that_comes_and_goes_is_compared_with_the_last_one_that_was_there():
    net = nn.Linear(3, 3)
    fit = FitDetector(ScoreNetwork(net))
    for present in (True, True, False, True, True):
        net.weight.grad = torch.ones(3, 3) if present else None
        fit.observe()
    assert fit.cosines() == pytest.approx([1.0, math.nan, 1.0, 1.0], nan_ok=True)


@pytest.mark.parametrize("text", ["x", "AAAA", "AACAPwAAAEAAAKBB", "/////w==", "AADAfw=="])
def test_a_damaged_fit_is_refused(text):
    fit = FitDetector(ScoreNetwork(nn.Linear(2, 1)))
    before = fit.to_text()
    with pytest.raises(StateError, match=r"a saved fit .*; to mend it, pass an unedited state"):
        fit.load(text)
    assert fit.to_text() == before


@pytest.mark.parametrize("text", ["x", "AAAA", "AACAPwAAAEAAAKBB"])
def test_a_damaged_monitor_is_refused(text):
    with pytest.raises(StateError, match="to mend it, pass an unedited state"):
        DivergenceMonitor.validate(text)


@pytest.mark.parametrize("phase", ["recording", "backtracking"])
def test_a_damaged_text_in_a_state_changes_nothing(tmp_path, phase):
    run = Run(seed=1)
    with attached(run, tmp_path) as handle:
        run.steps(7)
        if phase == "backtracking":
            record_all(run, handle)
            run.steps(3)
        assert handle.phase == phase
        state = handle.state_dict()
        with pytest.raises(StateError, match="to mend it, pass an unedited state"):
            handle.load_state_dict(state | {"fit": "AAAA"})
        assert handle.state_dict() == state


def test_states_of_version_1_are_read():
    """Their monitors had one more sign, "behind", as bit 1."""
    row = torch.tensor([3.0, 1.0, 1.0 + 2.0, 2.5, 0.25, 2.0, 7.0, 0.5, -0.5])
    monitor = DivergenceMonitor(ScoreNetwork(nn.Linear(2, 1, bias=False)), horizon=60)
    monitor.load(base64.b64encode(row.numpy().tobytes()).decode())
    assert monitor.signs == {"stalled"}
    row[2] = 2.0
    assert monitor.to_text() == base64.b64encode(row.numpy().tobytes()).decode()


def loud(form, folder, who):
    """Grow some ranks' parts of the gradients; return when this rank ended backtracking, and how often it warned."""
    from sharded_runs import Sharded
    from torch import distributed as dist

    run, warned = Sharded(form), []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage()) if record.levelname == "WARNING" else None
    logging.getLogger("disback_plugin").addHandler(handler)
    original = ScoreNetwork(run.teacher).fingerprint()
    schedule = disback.schedules.Auto(20)  # which does not end by itself before
    with disback.attach(**run.roles(), path=folder, record=4, every=4, schedule=schedule) as handle:
        growth = [1.0]
        run.optimizer_f.register_step_pre_hook(
            lambda *_: [p.grad.mul_(growth[0]) for p in run.fake_score.parameters() if p.grad is not None] and None
        )
        for step in range(16):
            growth[0] = 1e4 if step >= 9 and dist.get_rank() in who else 1.0
            run.step()
            if handle.phase == "done":
                break
        ended = [step, handle.phase, handle.position, ScoreNetwork(run.teacher).fingerprint() == original]
        return {"ended": ended, "warned": len([w for w in warned if "thirtyfold" in w])}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("form", "who"),
    [
        ("fsdp2", [1]),
        pytest.param("fsdp2", [0], marks=pytest.mark.slow),
        *(pytest.param(form, [0, 1], marks=pytest.mark.slow) for form in ("fsdp2", "ddp")),
    ],
)
def test_all_ranks_end_backtracking_at_the_update_at_which_rank_0_detects_a_divergence(nursery, tmp_path, form, who):
    first, second = returned(nursery.play(loud, 2, form, str(tmp_path / "path"), who))
    assert first["ended"] == second["ended"]
    if 0 in who:
        assert first["ended"][1:] == ["done", 0.0, True]
        assert first["ended"][0] < 15
    assert [first["warned"], second["warned"]] == ([1, 0] if 0 in who else [0, 0])
