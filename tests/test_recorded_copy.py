"""Recording without the trainer's fake score: a copy of the teacher is fitted to samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worlds import Run, Score, clone, difference

import disback_plugin as disback
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.weights.network import ScoreNetwork


def denoising_loss(net, x_0):
    sigma = torch.rand(len(x_0), 1) + 0.1
    eps = torch.randn_like(x_0)
    output = net(x_0 + sigma * eps, sigma)
    return disback.losses.denoising(output, x_0, eps, alpha=1.0, sigma=sigma, prediction=disback.Prediction.EPS)


def test_a_standalone_recording_resumes_with_buffers_that_no_state_dict_holds(tmp_path):
    class Counting(Score):
        def forward(self, x_t, sigma):
            self.scratch.add_(1)  # not persistent
            return super().forward(x_t, sigma) * (1 + 0.1 * self.scratch.sum())

    def record(folder, stop):
        calls = []
        torch.manual_seed(0)
        teacher, generator = Counting(), torch.nn.Linear(2, 2)

        def sample():
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(None)
            return generator(torch.randn(16, 2)).detach()

        options = {"iterations": 6, "every": 2, "learning_rate": 1e-2}
        return disback.record(teacher, sample=sample, loss=denoising_loss, path=folder, **options)

    whole = record(tmp_path / "whole", -1)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "broken", 3)
    assert record(tmp_path / "broken", -1).nodes == whole.nodes


def test_standalone_trains_a_copy_and_leaves_everything_else_alone(tmp_path):
    run = Run()
    before, stream = clone(dict(run.teacher.state_dict())), torch.get_rng_state()
    path = disback.record(
        run.teacher,
        sample=lambda: run.generator(torch.randn(16, 2)).detach(),
        loss=denoising_loss,
        path=tmp_path,
        iterations=40,
        every=20,
        learning_rate=1e-2,
    )
    assert len(path) == 3
    assert torch.equal(torch.get_rng_state(), stream)
    assert difference(dict(run.teacher.state_dict()), before) == []
    assert not any(p.requires_grad for p in run.teacher.parameters())
    # The last node fits the student's samples better than the teacher does.
    net = Score().eval()
    x_0 = run.generator(run.randn(4096, 2)).detach()
    fits = []
    for index in (0, -1):
        ScoreNetwork(net).load_state_dict(path[index])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            fits.append(denoising_loss(net, x_0).item())
    assert fits[1] < 0.9 * fits[0]


def test_standalone_recording_depends_on_its_seed_only(tmp_path):
    def record(folder, seed):
        run = Run()
        path = disback.record(
            run.teacher,
            sample=lambda: torch.randn(8, 2),
            loss=denoising_loss,
            path=folder,
            iterations=2,
            every=2,
            seed=seed,
        )
        return path.nodes[-1].sha256

    first = record(tmp_path / "a", 0)
    torch.rand(3)
    assert record(tmp_path / "b", 0) == first
    assert record(tmp_path / "c", 1) != first


@pytest.mark.parametrize("rate", [1, np.float32(0.5), torch.tensor(0.5)], ids=repr)
def test_a_learning_rate_is_any_kind_of_number(tmp_path, rate):
    run = Run()
    path = disback.record(
        run.teacher,
        sample=lambda: run.generator(torch.randn(8, 2)).detach(),
        loss=lambda net, x_0: (net(x_0, torch.ones(1)) - x_0).square().mean(),
        path=tmp_path,
        iterations=2,
        every=2,
        learning_rate=rate,
    )
    assert DegradationPath(tmp_path).manifest.learning_rate == path.manifest.learning_rate == float(rate)
