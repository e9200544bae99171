"""Masked samples are counted on their device, and the count is read every 50 updates."""

from __future__ import annotations

import logging

import pytest
import torch
from references import noise_of
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import Run

import disback_plugin as disback
from disback_plugin import hookimpl, kernels, losses
from disback_plugin.plugins import MaskedSamples
from disback_plugin.prediction import Prediction


class Listener:
    def __init__(self):
        self.heard = []

    @hookimpl
    def disback_log(self, values, step):
        self.heard.append((step, dict(values)))


@pytest.fixture
def listener():
    return Listener()


def some_loss(broken=0, loss=losses.diff_instruct, device="cpu"):
    """A loss of four samples, so many of which are broken."""
    x = torch.zeros(4, 3, device=device, requires_grad=True)
    real = torch.ones(4, 3)
    real[:broken] = torch.nan
    eps = noise_of(loss.__name__, x.detach())
    return loss(x, real.to(device), x.detach(), alpha=0.6, sigma=0.8, prediction=Prediction.EPS, **eps)


def scheduler(listener):
    run = Run()
    made = disback.TrajectoryScheduler(None, run.teacher, run.fake_score, plugins=(listener,))
    made.start()
    return made


@pytest.mark.parametrize("fuse", [False, True])
def test_a_wrapped_loss_reports_its_masked_samples_every_50_updates_and_at_the_end(listener, fuse):
    made = scheduler(listener)
    loss = made.wrap(kernels.fuse(some_loss) if fuse else some_loss)
    for update in range(120):
        loss(broken=update % 3)
        made.step()
    made.restore_teacher()
    made.restore_teacher()
    masked = [sum(u % 3 for u in range(*part)) for part in ((0, 50), (50, 100), (100, 120))]
    assert listener.heard == [
        (step, {"disback/masked_samples": count}) for step, count in zip((50, 100, 120), masked, strict=True)
    ]


def test_a_resumed_run_goes_on_with_its_own_count_of_updates(listener):
    first, second = scheduler(listener), scheduler(listener)
    for _ in range(30):
        first.step()
    second.load_state_dict(first.state_dict())
    loss = second.wrap(some_loss)
    for _ in range(20):
        loss(broken=1)
        second.step()
    assert listener.heard == [(50, {"disback/masked_samples": 20})]


def test_detaching_reports_the_last_count(listener, tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=1, every=1, schedule="warm", plugins=[listener]) as handle:
        run.steps(2)
        handle.scheduler.wrap(some_loss)(broken=3)
    assert listener.heard[-1] == (1, {"disback/masked_samples": 3})


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_to_copy.cpu", "masked_select")
        self.count += function.__name__.split(".")[0] in waits
        return function(*args, **(kwargs or {}))


def test_between_two_reports_nothing_is_read(listener):
    made = scheduler(listener)
    loss = made.wrap(some_loss)
    for reads in (0, 1, 1):
        with Reads() as mode:
            for _ in range(49 if not reads else 1):
                loss(broken=1)
                made.step()
        assert mode.count == (reads if made.generator_updates == 50 else 0)
    assert len(listener.heard) == 1


@pytest.mark.parametrize("loss", [losses.diff_instruct, losses.vsd, losses.dmd, losses.sid])
def test_no_loss_reads_a_value_forward_backward_or_counting(loss):
    # A meta tensor has no values: whoever asks for one raises.
    masked, skipped = MaskedSamples(), torch.zeros((), dtype=torch.int64, device="meta")
    watched = masked.watch(loss)
    for _ in range(3):
        x, real, fake = (torch.zeros(4, 3, 8, 8, device="meta", requires_grad=True) for _ in range(3))
        sigma = torch.zeros(4, 1, 1, 1, device="meta")
        options = {"alpha": sigma, "sigma": sigma, "weight": 2.0, "prediction": Prediction.V, "skipped": skipped}
        watched(x, real, fake, **noise_of(loss.__name__, x.detach()), **options).backward()
        assert x.grad.shape == x.shape
    with pytest.raises(RuntimeError, match="meta"):
        masked.report()


def test_without_a_plug_in_a_count_above_zero_is_a_warning(caplog):
    masked = MaskedSamples()
    loss = masked.watch(some_loss)
    with caplog.at_level(logging.WARNING):
        loss(broken=0)
        masked.report()
        assert not caplog.records
        loss(broken=2)
        masked.report()
    (record,) = caplog.records
    assert "2 samples were not finite" in record.getMessage()


def test_only_the_main_process_reports(listener, monkeypatch, caplog):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    masked = MaskedSamples(plugins=[listener])
    masked.watch(some_loss)(broken=2)
    assert masked.report() == 2
    assert not listener.heard
    assert not caplog.records


def test_a_loss_outside_is_not_counted_and_one_that_raises_leaves_nothing_behind():
    masked = MaskedSamples()
    with pytest.raises(ZeroDivisionError):
        masked.watch(lambda: 1 / 0)()
    some_loss(broken=2)
    assert masked.report() == 0


@pytest.mark.slow
def test_the_fused_form_counts_the_same():
    masked = MaskedSamples()
    masked.watch(some_loss)(broken=3, loss=kernels.fuse(losses.dmd, compile=True))
    assert masked.report() == 3
