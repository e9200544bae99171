"""A recording inside the loop leaves the learning rates as they would be without it."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from torch.optim import lr_scheduler as lr
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.errors import OptionError, StateError
from disback_plugin.schedules import Ramp

SCHEDULERS = {
    "warm-up": lambda o: [lr.LambdaLR(o, lambda step: min(1.0, (step + 1) / 7))],
    "one cycle, which moves betas too": lambda o: [lr.OneCycleLR(o, max_lr=0.1, total_steps=60)],
    "cosine": lambda o: [lr.CosineAnnealingLR(o, T_max=20)],
    "milestones": lambda o: [lr.MultiStepLR(o, milestones=[2, 6, 12], gamma=0.5)],
    "in sequence": lambda o: [
        lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=3), lr.MultiStepLR(o, [2, 4])], milestones=[3])
    ],
    "chained": lambda o: [lr.ChainedScheduler([lr.LinearLR(o, 0.1, total_iters=9), lr.ExponentialLR(o, 0.9)])],
    "two at once": lambda o: [lr.LinearLR(o, 0.1, total_iters=9), lr.ExponentialLR(o, 0.9)],
}


class Scheduled(Run):
    """A run whose loop steps schedulers after both optimizers; it keeps the rates of the generator's updates."""

    def __init__(self, make=SCHEDULERS["warm-up"], accelerated=False, **options):
        super().__init__(**options)
        self.schedulers = [*make(self.optimizer_f), *make(self.optimizer_g)]
        if accelerated:
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=True)
            prepared = self.accelerator.prepare(self.optimizer_f, self.optimizer_g, *self.schedulers)
            self.optimizer_f, self.optimizer_g, *self.schedulers = prepared
        self.rates = []

    def step(self):
        self.fake_step()
        self.generator_step()
        self.rates.append([(group["lr"], group.get("betas")) for group in self.optimizer_g.param_groups])
        for scheduler in self.schedulers:
            scheduler.step()

    def checkpoint(self):
        # as torch.save does: a copy
        return super().checkpoint() | {"schedulers": [json.loads(json.dumps(s.state_dict())) for s in self.schedulers]}

    def load(self, checkpoint):
        super().load(checkpoint)
        for scheduler, state in zip(self.schedulers, checkpoint["schedulers"], strict=True):
            scheduler.load_state_dict(dict(state))


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerate's"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_the_first_update_after_a_recording_has_the_first_learning_rate(tmp_path, make, accelerated):
    plain, run = Scheduled(make, accelerated), Scheduled(make, accelerated)
    plain.steps(8)
    with disback.attach(**run.roles(), path=tmp_path, record=5, every=5) as handle:
        run.steps(5)
        assert run.rates == plain.rates[:5], "while recording the trainer's own scheduler is left alone"
        run.steps(8)
        assert handle.generator_updates == 8
    assert run.rates[5:] == plain.rates, "the rates that the updates really had"


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_a_run_that_records_is_the_run_that_reuses_the_path(tmp_path, make):
    first, second = Scheduled(make), Scheduled(make)
    with disback.attach(**first.roles(), path=tmp_path, record=4, every=2, schedule=Ramp(6)):
        first.steps(4)
        at_start = Run.checkpoint(first)
        first.steps(8)
    with disback.attach(**second.roles(), path=tmp_path, record=4, every=2, schedule=Ramp(6)):
        rates = [
            [{k: v for k, v in group.items() if k != "params"} for group in o.param_groups] for o in optimizers(second)
        ]
        Run.load(second, at_start)
        for optimizer, groups in zip(optimizers(second), rates, strict=True):
            for group, then in zip(optimizer.param_groups, groups, strict=True):
                group.update(then)
        second.steps(8)
    assert difference(first.checkpoint(), second.checkpoint()) == []


def optimizers(run):
    return run.optimizer_f, run.optimizer_g


@pytest.mark.parametrize("order", ["attach, load, load_state_dict", "load, attach(state=)"])
@pytest.mark.parametrize("moment", [0, 2, 4, 5, 8])
@pytest.mark.slow
def test_a_resumed_run_has_the_learning_rates_of_the_uninterrupted_one(tmp_path, moment, order):
    options = {"record": 4, "every": 2, "schedule": Ramp(4)}
    whole, first, second = Scheduled(), Scheduled(), Scheduled()
    if order.startswith("load"):  # attached in the middle of a warm-up
        whole.steps(2)
        first.steps(2)
    with disback.attach(**whole.roles(), path=tmp_path / "whole", **options):
        whole.steps(9)
        expected = whole.checkpoint()
    handle = disback.attach(**first.roles(), path=tmp_path / "split", **options)
    first.steps(moment)
    saved, state = first.checkpoint(), json.loads(json.dumps(handle.state_dict()))
    handle.path.lock.release()  # as the end of its process does
    if order.startswith("attach"):
        handle = disback.attach(**second.roles(), path=tmp_path / "split", **options)
        second.load(saved)
        handle.load_state_dict(state)
    else:
        second.load(saved)
        handle = disback.attach(**second.roles(), path=tmp_path / "split", **options, state=state)
    assert handle.state_dict() == state
    second.steps(9 - moment)
    assert difference(second.checkpoint(), expected) == []


def test_record_0_leaves_the_schedulers_alone():
    plain, run = Scheduled(), Scheduled()
    plain.steps(6)
    with disback.attach(**run.roles(), record=0):
        run.steps(6)
    assert difference(run.checkpoint(), plain.checkpoint()) == []
    assert run.rates == plain.rates


def test_with_nothing_to_restore_the_warm_up_is_over_after_recording(tmp_path):
    run = Scheduled()
    with disback.attach(**run.roles(), path=tmp_path, record=5, every=5, restore=()):
        run.steps(6)
    assert run.schedulers[0].last_epoch == 6


class AverageRamp:
    """As EMA ramps are: a count that grows with each step of the loop."""

    count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_the_ramp_of_an_average_is_restored_if_it_is_passed(tmp_path):
    run, ramp = Scheduled(), AverageRamp()
    with disback.attach(**run.roles(), path=tmp_path, record=5, every=5, restore=("schedulers", ramp)):
        for _ in range(7):
            run.step()
            ramp.count += 1
    assert ramp.count == run.schedulers[1].last_epoch == 2


def test_detach_while_recording_restores_the_schedulers(tmp_path):
    run = Scheduled()
    with disback.attach(**run.roles(), path=tmp_path, record=9, every=3):
        run.steps(3)
    assert [s.last_epoch for s in run.schedulers] == [0, 0]
    assert run.optimizer_g.param_groups[0]["lr"] == run.optimizer_g.param_groups[0]["initial_lr"] / 7


def test_a_learning_rate_in_a_tensor_stays_that_tensor(tmp_path):
    run = Run()
    rate = torch.tensor(0.01)
    run.optimizer_g = torch.optim.Adam(run.generator.parameters(), lr=rate, capturable=False, foreach=False)
    scheduler = lr.LambdaLR(run.optimizer_g, lambda step: 1.0 / (step + 1))
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=2):
        for _ in range(3):
            run.step()
            scheduler.step()
    assert run.optimizer_g.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.005)


def test_schedulers_may_be_passed_too_accelerates_among_them(tmp_path):
    run = Scheduled(accelerated=True)
    with disback.attach(**run.roles(), path=tmp_path, record=5, every=5, restore=run.schedulers):
        run.steps(5)
        assert run.rates[-1] == [(0.01 * 5 / 7, (0.9, 0.999))]
        run.steps(1)
        assert run.rates[-1] == [(0.01 / 7, (0.9, 0.999))]


def test_two_schedulers_that_cannot_be_told_apart_are_left_alone_and_named(tmp_path, caplog):
    run = Scheduled(lambda o: [lr.ExponentialLR(o, 0.9), lr.ExponentialLR(o, 0.8)])
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1):
        run.steps(3)
    assert "ExponentialLR of optimizer 0 is advanced by the recording and not restored: pass restore=" in caplog.text
    assert [s.last_epoch for s in run.schedulers] == [3, 3, 3, 3]


def test_a_scheduler_that_the_trainer_dropped_is_not_searched_at_each_step(tmp_path, monkeypatch):
    from disback_plugin.loop import lr_schedulers

    gc.unfreeze()  # what is not found is looked for among frozen objects, too
    run, looked = Scheduled(), []
    objects = lr_schedulers.gc.get_objects
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1):
        run.steps(2)
        run.schedulers.clear()
        monkeypatch.setattr(lr_schedulers.gc, "get_objects", lambda: looked.append(1) or objects())
        run.steps(5)
    assert len(looked) == 2  # once for each optimizer


@pytest.mark.parametrize("restore", ["optimizers", 3, [None], torch.nn.Linear(1, 2)])
def test_an_object_that_cannot_be_restored_is_refused(tmp_path, restore):
    run = Run()
    with pytest.raises(OptionError, match="restore="):
        disback.attach(**run.roles(), path=tmp_path / "p", record=2, every=1, restore=restore)
    assert not (tmp_path / "p").exists()


def test_a_state_that_restores_schedulers_which_do_not_exist_is_refused(tmp_path):
    run, bare = Scheduled(), Run()
    handle = disback.attach(**run.roles(), path=tmp_path, record=4, every=2)
    run.steps(2)
    saved, state = run.checkpoint(), handle.state_dict()
    Run.load(bare, saved)
    before = clone(bare.checkpoint())
    with pytest.raises(StateError, match="LambdaLR of optimizer 0"):
        disback.attach(**bare.roles(), path=tmp_path, record=4, every=2, state=state)
    assert difference(bare.checkpoint(), before) == []


def test_a_scheduler_is_found_although_garbage_collection_is_frozen(tmp_path):
    run = Scheduled()
    plain = Scheduled()
    plain.steps(3)
    gc.collect()
    gc.freeze()
    try:
        with disback.attach(**run.roles(), path=tmp_path, record=5, every=5):
            run.steps(8)
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
    assert run.rates[5:] == plain.rates


def _timms(optimizer):
    from timm.scheduler import CosineLRScheduler

    scheduler = CosineLRScheduler(optimizer, 100, warmup_t=10, warmup_lr_init=1e-5, t_in_epochs=False)
    return lambda update: scheduler.step_update(update + 1)


def _by_hand(optimizer):
    def write(update):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (update + 2) / 10)

    write(-1)
    return write


def _of_the_decay(optimizer):
    return lambda update: optimizer.param_groups[0].update(weight_decay=0.1 * (update + 1))


@pytest.mark.parametrize("make", [_timms, _by_hand, _of_the_decay])
def test_a_setting_that_no_scheduler_of_torchs_has_changed_is_restored_once_and_named(tmp_path, caplog, make):
    run, seen = Run(), []
    after_update = make(run.optimizer_g)
    first = {**run.optimizer_g.param_groups[0]}
    run.optimizer_g.register_step_post_hook(lambda o, *_: seen.append({**o.param_groups[0]}))
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2):
        for update in range(6):
            run.step()
            after_update(update)
    assert [seen[4][key] for key in ("lr", "weight_decay")] == [first[key] for key in ("lr", "weight_decay")]
    assert caplog.text.count("another setting, of Adam was changed by no LRScheduler") == 1


def test_an_object_of_another_library_that_counts_is_restored_if_it_is_passed(tmp_path, caplog):
    class WarmUp:  # as DeepSpeed's WarmupLR, which is no LRScheduler
        def __init__(self, optimizer):
            self.optimizer, self.count = optimizer, -1
            self.step()

        def step(self):
            self.count += 1
            self.optimizer.param_groups[0]["lr"] = 1e-3 * (self.count + 1)

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    run = Run()
    warmup = WarmUp(run.optimizer_g)
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, restore=("schedulers", warmup)):
        for _ in range(6):
            run.step()
            warmup.step()
    assert run.optimizer_g.param_groups[0]["lr"] == pytest.approx(3e-3)
    assert "by no LRScheduler" not in caplog.text
