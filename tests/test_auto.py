"""Schedule "auto": it ends the recording when s' is fitted, and takes the length of backtracking from it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.schedules import Auto, Schedule, Target


def attached(run, folder, **options):
    return disback.attach(**run.roles(), path=folder, **({"record": 60, "every": 20} | options))


def test_auto_ends_the_recording_when_s_phi_is_fitted_and_backtracks_as_fast(tmp_path):
    run = Run(seed=1)
    before = clone(dict(run.teacher.state_dict()))
    with attached(run, tmp_path) as handle:
        rounds = 0
        while handle.phase == "recording":
            assert "of at most 60 fake-score updates" in repr(handle)
            run.step()
            rounds += 1
        manifest = handle.path.manifest
        assert 10 <= rounds == manifest.ended < 60
        assert manifest.fitted <= manifest.ended
        assert handle.path.nodes[-1].iteration == manifest.ended
        walked = Auto(manifest.updates_to_fit)
        for update in range(3 * manifest.updates_to_fit):
            target = walked(update, len(handle.path) - 1)
            assert (handle.position, handle.scheduler.gradient_factor) == target
            run.step()
        assert (handle.phase, handle.position) == ("done", 0.0)
        assert difference(dict(run.teacher.state_dict()), before) == []
    handle.path.verify()


def test_the_logged_run_shows_the_length_that_auto_took(tmp_path, caplog):
    caplog.set_level("INFO", logger="disback_plugin")
    run = Run(seed=1)
    with attached(run, tmp_path) as handle:
        while handle.phase == "recording":
            run.step()
    assert f"Auto(fitted={handle.path.manifest.updates_to_fit}), 0 generator updates" in caplog.text


def test_another_schedule_records_to_the_end_and_notes_the_fit(tmp_path):
    run = Run(seed=1)
    with attached(run, tmp_path, schedule="warm") as handle:
        run.steps(60)
        assert handle.phase == "done"
    assert handle.path.manifest.ended is None
    assert [node.iteration for node in handle.path.nodes] == [20, 40, 60]
    assert handle.path.manifest.fitted is not None
    assert handle.path.manifest.updates_to_fit == handle.path.manifest.fitted


@pytest.mark.parametrize("held", [float, torch.tensor])
def test_autos_recording_has_twice_the_learning_rate_until_s_phi_is_fitted(tmp_path, held):
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
    assert (manifest.learning_rate_factor, manifest.updates_to_fit) == (2, 2 * manifest.fitted)


def test_the_learning_rate_is_restored_after_a_step_that_raised(tmp_path):
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


def test_other_parameters_of_the_optimizer_keep_their_learning_rate(tmp_path):
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


def test_a_recording_that_is_never_fitted_warns_and_counts_at_its_rate(tmp_path, caplog):
    run = Run(seed=1)
    for group in run.optimizer_f.param_groups:
        group["lr"] = 1e-6
    with attached(run, tmp_path, record=20, every=20) as handle:
        run.steps(20)
        known = handle.path.manifest
    assert (known.fitted, known.learning_rate_factor, known.updates_to_fit) == (None, 2, 40)
    assert "was not seen to be fitted" in caplog.text


def test_a_resumed_recording_keeps_its_learning_rate_under_another_schedule(tmp_path):
    run, rates = Run(seed=1), []
    own = run.optimizer_f.param_groups[0]["lr"] = 1e-6
    with attached(run, tmp_path, record=40, every=10):
        run.steps(10)
    with attached(run, tmp_path, record=40, every=10, schedule="warm") as handle:
        run.optimizer_f.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        run.steps(31)
        assert handle.phase == "done"
        assert handle.path.manifest.updates_to_fit == 80
    assert rates == [2 * own] * 30 + [own]


def test_an_optimizer_without_a_learning_rate_is_left_alone(tmp_path):
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
    assert (known.fitted, known.learning_rate_factor, known.updates_to_fit) == (None, 1, 60)


def test_a_recording_too_short_to_fit_gives_its_own_length(tmp_path):
    run = Run(seed=1)
    with attached(run, tmp_path, record=3, every=3) as handle:
        run.steps(3)
        assert handle.path.manifest.fitted is None
        assert handle.scheduler.timeline()[-1][0] == 3 * 2  # its rate was twice the trainer's


def test_auto_without_a_path_changes_nothing(tmp_path):
    plain, attached_run = Run(), Run()
    plain.steps(5)
    with disback.attach(**attached_run.roles(), record=0, schedule="auto"):
        attached_run.steps(5)
    assert difference(attached_run.checkpoint(), plain.checkpoint()) == []


@pytest.mark.parametrize("stop", [1, 5, 12, 15, 30])
def test_a_run_that_resumes_anywhere_decides_as_the_uninterrupted_one(tmp_path, stop):
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
    handle.path.lock.release()
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
def test_a_fake_step_that_clears_its_gradients_is_observed(tmp_path, to_none):
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


def test_a_loop_without_visible_gradients_is_warned(tmp_path, caplog):
    run = Run()

    def by_hand():  # no optimizer of torch
        run.fake_step_gradients = torch.autograd.grad(run.generator(run.randn(4, 2)).sum(), run.generator.parameters())
        with torch.no_grad():
            for weight in run.fake_score.parameters():
                weight += 0.01

    disback.record(run.teacher, run.fake_score, by_hand, path=tmp_path, iterations=6, every=6)
    assert "no gradients of s' were seen" in caplog.text


def test_a_standalone_recording_notes_the_fit(tmp_path):
    run = Run(seed=1)
    path = disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=40, every=20)
    assert path.manifest.fitted in range(5, 41, 5)
    scheduler = disback.TrajectoryScheduler(path, run.teacher, run.fake_score)
    scheduler.start()
    assert scheduler.timeline()[-1][0] == path.manifest.fitted


class Mine(Schedule):
    """A schedule of one's own that waits for the recording."""

    until_fitted = True

    def __init__(self, updates=None):
        self.updates = updates

    def __repr__(self):
        return "Mine()"

    def __call__(self, updates, nodes):
        return Target(float(nodes) if self.updates and updates < self.updates else 0.0)

    def horizon(self, nodes):
        return self.updates or 0

    def settle(self, fitted):
        return Mine(2 * fitted)


def test_a_users_schedule_can_take_its_length_from_the_recording(tmp_path):
    run = Run(seed=1)
    with attached(run, tmp_path, schedule=Mine()) as handle:
        while handle.phase == "recording":
            run.step()
        assert handle.path.manifest.ended < 60
        assert handle.scheduler.plan.horizon == 2 * handle.path.manifest.updates_to_fit
        assert handle.position == len(handle.path) - 1
