"""When a recording has done its work, and what `auto` makes of it."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.convergence import SAMPLE, FitDetector, fitted_after
from disback_plugin.schedules import Auto, Target
from disback_plugin.weights.network import ScoreNetwork

numbers = st.floats(-1, 1) | st.just(math.nan)


@given(st.lists(numbers, max_size=80))
def test_the_verdict_stays_whatever_comes_later(cosines):
    first = fitted_after(cosines)
    for more in (cosines + [1.0] * 30, cosines + [-1.0] * 7):
        assert first is None or fitted_after(more) == first


@given(length=st.integers(0, 120), agreeing=st.floats(0.11, 1))
def test_gradients_that_agree_are_no_fit_however_long(length, agreeing):
    assert fitted_after([agreeing] * length) is None


@given(st.integers(0, 60))
def test_a_fit_is_seen_soon_after_the_gradients_stop_agreeing(agreeing):
    cosines = [0.9] * agreeing + [-0.4] * 100
    assert agreeing <= fitted_after(cosines) <= 1.5 * agreeing + 10


def test_gradients_that_are_not_finite_count_for_nothing():
    assert fitted_after([math.nan] * 40) is None
    assert fitted_after([math.nan, -0.5, -0.5, -0.5, -0.5]) is None
    assert fitted_after([math.nan] + [-0.5] * 8) == 10


def gradients(net, seed):
    draw = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw)
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def test_a_small_network_is_looked_at_whole():
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


def test_a_sample_of_a_large_networks_gradient_knows_its_cosine():
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


def test_a_look_goes_on_from_its_text():
    net = nn.Linear(4, 4)
    whole, interrupted = FitDetector(ScoreNetwork(net)), FitDetector(ScoreNetwork(net))
    for seed in range(6):
        gradients(net, seed)
        whole.observe()
        interrupted.observe()
        text = json.loads(json.dumps(interrupted.to_text()))
        interrupted = FitDetector(ScoreNetwork(net))
        interrupted.load_text(text)
    assert interrupted.cosines() == whole.cosines()


def test_a_parameter_that_never_has_a_gradient_does_not_matter():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].requires_grad_(False)
    fit = FitDetector(ScoreNetwork(net))
    for _ in range(2):
        net[1].weight.grad, net[1].bias.grad = torch.ones(3, 3), torch.ones(3)
        fit.observe()
    assert fit.cosines() == pytest.approx([1.0])


# -- auto -------------------------------------------------------------------------------------------------------------


def attached(run, folder, **options):
    return disback.attach(**run.roles(), path=folder, **({"record": 60, "every": 20} | options))


def test_auto_ends_the_recording_when_s_phi_is_fitted_and_walks_back_as_fast(tmp_path):
    run = Run(seed=1)
    before = clone(dict(run.teacher.state_dict()))
    with attached(run, tmp_path) as handle:
        rounds = 0
        while handle.phase == "recording":
            assert "at most 60" in repr(handle)
            run.step()
            rounds += 1
        manifest = handle.path.manifest
        assert 10 <= rounds == manifest.ended < 60
        assert manifest.fitted <= manifest.ended
        assert handle.path.nodes[-1].iteration == manifest.ended
        walked = Auto(manifest.clock)
        for update in range(3 * manifest.clock):
            target = walked(update, len(handle.path) - 1)
            assert (handle.position, handle.scheduler.gradient_factor) == target
            run.step()
        assert (handle.phase, handle.position) == ("done", 0.0)
        assert difference(dict(run.teacher.state_dict()), before) == []
    handle.path.verify()


def test_auto_says_in_one_line_what_it_decided_and_why(tmp_path, caplog):
    caplog.set_level("INFO", logger="disback_plugin")
    run = Run(seed=1)
    with attached(run, tmp_path) as handle:
        while handle.phase == "recording":
            run.step()
    (line,) = [message for message in caplog.messages if message.startswith("auto: ")]
    assert f"is fitted in {handle.path.manifest.clock} updates" in line


def test_another_schedule_records_to_the_end_and_notes_the_fit_all_the_same(tmp_path):
    run = Run(seed=1)
    with attached(run, tmp_path, schedule="warm") as handle:
        run.steps(60)
        assert handle.phase == "done"
    assert handle.path.manifest.ended is None
    assert [node.iteration for node in handle.path.nodes] == [20, 40, 60]
    assert handle.path.manifest.fitted is not None
    assert handle.path.manifest.clock == handle.path.manifest.fitted


@pytest.mark.parametrize("held", [float, torch.tensor])
def test_the_recording_of_auto_has_twice_the_learning_rate_until_s_phi_is_fitted_and_nothing_else_has(tmp_path, held):
    run = Run(seed=1)
    group = run.optimizer_f.param_groups[0]
    rate = group["lr"] = held(float(group["lr"]))
    own, during = float(rate), []
    with attached(run, tmp_path) as handle:
        run.optimizer_f.register_step_pre_hook(lambda *_: during.append(float(group["lr"])))
        for _ in range(40):
            run.step()
            assert float(group["lr"]) == own
        manifest = handle.path.manifest
    assert during == [2 * own] * manifest.fitted + [own] * (40 - manifest.fitted)
    assert group["lr"] is rate
    assert (manifest.haste, manifest.clock) == (2, 2 * manifest.fitted)


def test_a_rate_is_put_back_though_a_step_raised_and_no_checkpoint_holds_another(tmp_path):
    run = Run(seed=1)
    own = run.optimizer_f.param_groups[0]["lr"]
    with attached(run, tmp_path):
        run.step()
        broken = run.optimizer_f.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.step()
        broken.remove()
        assert run.optimizer_f.state_dict()["param_groups"][0]["lr"] == own
    assert run.optimizer_f.param_groups[0]["lr"] == own


def test_groups_that_share_a_tensor_as_their_rate_have_twice_that_rate(tmp_path):
    run = Run(seed=1)
    rate = torch.tensor(0.01)
    halves = [{"params": [weight]} for weight in run.fake_score.parameters()]
    run.optimizer_f = torch.optim.Adam(halves, lr=rate, foreach=False)
    during = []
    with attached(run, tmp_path):
        run.optimizer_f.register_step_pre_hook(
            lambda *_: during.append({float(group["lr"]) for group in run.optimizer_f.param_groups})
        )
        run.step()
    assert during == [{2 * float(rate)}]
    assert float(rate) == pytest.approx(0.01, rel=1e-7)


def test_what_else_the_optimizer_trains_keeps_its_rate(tmp_path):
    run = Run(seed=1)
    head, rates = nn.Linear(2, 1), []  # as a discriminator's on s_phi's features
    run.optimizer_f.add_param_group({"params": head.parameters(), "lr": 0.5})
    own = run.optimizer_f.param_groups[0]["lr"]
    with attached(run, tmp_path):
        run.optimizer_f.register_step_pre_hook(
            lambda *_: rates.extend(group["lr"] for group in run.optimizer_f.param_groups)
        )
        run.step()
    assert rates == [2 * own, 0.5]


def test_a_recording_that_is_never_fitted_says_at_which_rate_it_was_and_counts_so(tmp_path, caplog):
    run = Run(seed=1)
    for group in run.optimizer_f.param_groups:
        group["lr"] = 1e-6
    with attached(run, tmp_path, record=20, every=20) as handle:
        run.steps(20)
        known = handle.path.manifest
    assert (known.fitted, known.haste, known.clock) == (None, 2, 40)
    assert "was not seen to be fitted" in caplog.text


def test_a_recording_goes_on_at_the_rate_it_began_with_whatever_the_schedule(tmp_path):
    run, rates = Run(seed=1), []
    own = run.optimizer_f.param_groups[0]["lr"] = 1e-6
    with attached(run, tmp_path, record=40, every=10):
        run.steps(10)
    with attached(run, tmp_path, record=40, every=10, schedule="warm") as handle:
        run.optimizer_f.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        run.steps(31)
        assert handle.phase == "done"
        assert handle.path.manifest.clock == 80
    assert rates == [2 * own] * 30 + [own]


def test_an_optimizer_without_a_learning_rate_records_at_its_own_pace(tmp_path):
    run = Run(seed=1)

    class Paceless(torch.optim.SGD):
        """Like Adafactor with relative steps: its groups hold no number."""

        def step(self, closure=None):
            for group in self.param_groups:
                assert group["lr"] is None
                group["lr"] = 0.01
            super().step(closure)
            for group in self.param_groups:
                group["lr"] = None

    run.optimizer_f = Paceless(run.fake_score.parameters(), lr=0.01)
    run.optimizer_f.param_groups[0]["lr"] = None
    with attached(run, tmp_path) as handle:
        run.steps(60)
        known = handle.path.manifest
    assert (known.fitted, known.haste, known.clock) == (None, 1, 60)


def test_a_recording_too_short_to_fit_is_walked_back_in_its_own_length_at_the_trainers_rate(tmp_path):
    run = Run(seed=1)
    with attached(run, tmp_path, record=3, every=3) as handle:
        run.steps(3)
        assert handle.path.manifest.fitted is None
        assert handle.scheduler.timeline()[-1][0] == 3 * 3 * 2  # its rate was twice the trainer's


def test_auto_without_a_path_changes_nothing(tmp_path):
    plain, attached_run = Run(), Run()
    plain.steps(5)
    with disback.attach(**attached_run.roles(), record=0, schedule="auto"):
        attached_run.steps(5)
    assert difference(attached_run.checkpoint(), plain.checkpoint()) == []


@pytest.mark.parametrize("stop", [1, 4, 5, 9, 12, 14, 15, 20, 30])
def test_a_run_that_was_stopped_anywhere_decides_as_one_that_was_not(tmp_path, stop):
    whole = Run(seed=1)
    with attached(whole, tmp_path / "whole") as handle:
        whole.steps(40)
        decided = handle.path.manifest
        ended = (handle.position, handle.generator_updates)
    run = Run(seed=1)
    handle = attached(run, tmp_path / "path")
    run.steps(stop)
    state, checkpoint = json.loads(json.dumps(handle.state_dict())), copy.deepcopy(run.checkpoint())
    run.steps(7)  # lost
    for hook in (run.optimizer_g, run.optimizer_f):  # the process is gone, without a detach
        hook._optimizer_step_pre_hooks.clear()
    again = Run(seed=1)
    with attached(again, tmp_path / "path") as handle:
        again.load(checkpoint)
        handle.load_state_dict(state)
        again.steps(40 - stop)
        assert (handle.position, handle.generator_updates) == ended
        found = handle.path.manifest
        assert (found.fitted, found.ended, found.nodes) == (decided.fitted, decided.ended, decided.nodes)
    assert difference(again.checkpoint(), whole.checkpoint()) == []


@pytest.mark.parametrize("to_none", [True, False])
def test_a_fake_step_that_clears_its_gradients_at_its_end_is_seen_all_the_same(tmp_path, to_none):
    fitted = []
    for clears in (False, True):
        run = Run(seed=1)

        def step(run=run, clears=clears):
            run.fake_step()
            if clears:
                run.optimizer_f.zero_grad(set_to_none=to_none)

        folder = tmp_path / str(clears)
        path = disback.record(run.teacher, run.fake_score, step, path=folder, iterations=40, every=20)
        fitted.append(path.manifest.fitted)
    assert fitted[0] == fitted[1]
    assert None not in fitted


def test_a_loop_whose_gradients_nobody_saw_is_told(tmp_path, caplog):
    run = Run()

    def by_hand():  # no optimizer of torch
        run.fake_step_gradients = torch.autograd.grad(run.generator(run.randn(4, 2)).sum(), run.generator.parameters())
        with torch.no_grad():
            for weight in run.fake_score.parameters():
                weight += 0.01

    disback.record(run.teacher, run.fake_score, by_hand, path=tmp_path, iterations=6, every=6)
    assert "no gradients of s' were seen" in caplog.text


def test_gradients_that_are_all_zero_say_nothing():
    net = nn.Linear(3, 3)
    fit = FitDetector(ScoreNetwork(net))
    for _ in range(20):
        net.weight.grad, net.bias.grad = torch.zeros(3, 3), torch.zeros(3)
        fit.observe()
    assert fit.fitted_after() is None
    assert all(map(math.isnan, fit.cosines()))


def test_a_sparse_gradient_counts_as_none(tmp_path):
    net = nn.ModuleDict({"table": nn.Embedding(10, 3, sparse=True), "head": nn.Linear(3, 1)})
    fit = FitDetector(ScoreNetwork(net))
    for _ in range(2):
        net.zero_grad()
        net["head"](net["table"](torch.tensor([1, 2]))).sum().backward()
        fit.observe()
    assert fit.cosines() == pytest.approx([1.0])


def test_a_standalone_recording_notes_the_fit(tmp_path):
    run = Run(seed=1)
    path = disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=40, every=20)
    assert path.manifest.fitted in range(5, 41, 5)
    scheduler = disback.TrajectoryScheduler(path, run.teacher, run.fake_score)
    scheduler.start()
    assert scheduler.timeline()[-1][0] == 3 * path.manifest.fitted


class Mine:
    """A schedule of one's own that waits for the recording."""

    def __init__(self, updates=None):
        self.updates = updates

    def __repr__(self):
        return "Mine()"

    def __call__(self, updates, nodes):
        return Target(float(nodes) if self.updates and updates < self.updates else 0.0)

    def horizon(self, nodes):
        return self.updates or 0

    def validate(self, nodes):
        pass

    def settle(self, fitted):
        return Mine(2 * fitted)


def test_a_schedule_of_ones_own_can_wait_for_the_recording(tmp_path):
    run = Run(seed=1)
    with attached(run, tmp_path, schedule=Mine()) as handle:
        while handle.phase == "recording":
            run.step()
        assert handle.path.manifest.ended < 60
        assert handle.scheduler.horizon == 2 * handle.path.manifest.clock
        assert handle.position == len(handle.path) - 1
