"""Tests on gradients: when a network is fitted, and when s_phi stalls or diverges."""

from __future__ import annotations

import base64
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

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


def test_states_of_version_1_are_read():
    """Their monitors had one more sign, "behind", as bit 1."""
    row = torch.tensor([3.0, 1.0, 1.0 + 2.0, 2.5, 0.25, 2.0, 7.0, 0.5, -0.5])
    monitor = DivergenceMonitor(ScoreNetwork(nn.Linear(2, 1, bias=False)), horizon=60)
    monitor.load(base64.b64encode(row.numpy().tobytes()).decode())
    assert monitor.signs == {"stalled"}
    row[2] = 2.0
    assert monitor.to_text() == base64.b64encode(row.numpy().tobytes()).decode()
