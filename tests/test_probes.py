from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from worlds import Run, Score, clone, difference

import disback_plugin as disback
from disback_plugin.path.codecs import SMALLEST_FIRST
from disback_plugin.path.delta import Decoded
from disback_plugin.path.encoding import encode
from disback_plugin.path.probes import Probe
from disback_plugin.weights.network import ScoreNetwork

TESTS = Path(__file__).parent


class Dropped(nn.Module):
    """A network whose forward draws random numbers, and whose output is a mapping as those of diffusers are."""

    def __init__(self):
        super().__init__()
        self.inner = Score()

    def forward(self, x, *, sigma):
        return {"sample": nn.functional.dropout(self.inner(x, sigma), 0.5, self.training), "steps": 3}


def trained(net, steps=5, **arguments):
    """Return the state before and after some updates on random targets."""
    before = clone(ScoreNetwork(net).state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        output = net(torch.randn(16, 2), **arguments)
        (output["sample"] if isinstance(output, dict) else output).square().sum().backward()
        optimizer.step()
    return before


def test_the_error_is_that_of_the_scores_on_the_last_inputs():
    net = Score()
    probe = Probe(ScoreNetwork(net))
    x, sigma = torch.randn(16, 2), torch.ones(16, 1)
    before = trained(net, sigma=sigma)
    net(x, sigma)
    previous, state = Decoded(before, ()), ScoreNetwork(net).state_dict()
    made = encode("int4", state, previous, probe)
    twin, outputs = Score().eval(), []
    for weights in (state, Decoded(before, [made.delta]).state_dict(), before):
        ScoreNetwork(twin).load_state_dict(weights)
        outputs.append(twin(x, sigma))
    now, decoded, then = outputs
    assert made.codec_error == pytest.approx(((decoded - now).norm() / (now - then).norm()).item(), rel=1e-4)
    assert 0 < made.codec_error < 0.2


def test_measuring_changes_nothing_in_the_network_or_the_random_streams():
    net = Dropped()
    probe = Probe(ScoreNetwork(net))
    before = trained(net, sigma=torch.ones(16, 1))
    state, random = clone(dict(net.state_dict())), torch.get_rng_state()
    flags = [module.training for module in net.modules()]
    made = encode("int6", ScoreNetwork(net).state_dict(), Decoded(before, ()), probe)
    assert made.codec_error is not None
    assert difference(dict(net.state_dict()), state) == []
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in net.modules()] == flags


def test_the_autocast_of_the_training_forward_is_used_again():
    net = nn.Linear(4, 4)
    probe = Probe(ScoreNetwork(net))
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            net(torch.ones(2, 4))
        assert [output.dtype for output in probe.outputs()] == [dtype]


def test_a_closed_probe_leaves_no_hook_and_keeps_nothing():
    net = nn.Linear(4, 4)
    probe = Probe(ScoreNetwork(net))
    net(torch.ones(2, 4))
    probe.close()
    assert not net._forward_pre_hooks
    assert not probe.ready


def test_experts_are_evaluated_each_on_its_own_inputs():
    experts = {"high": nn.Linear(2, 2), "low": nn.Linear(2, 2), "idle": nn.Linear(2, 2)}
    role = ScoreNetwork(experts)
    probe = Probe(role)
    before = clone(role.state_dict())
    experts["high"](torch.ones(1, 2))
    experts["low"](torch.zeros(1, 2))
    with torch.no_grad():
        for expert in experts.values():
            expert.weight += 1e-3
    assert len(probe.outputs()) == 2
    assert encode("int8", role.state_dict(), Decoded(before, ()), probe).codec_error < 0.02


def test_a_network_that_does_not_like_to_be_copied_is_recorded_all_the_same(caplog):
    class Stubborn(Score):
        def __deepcopy__(self, memo):
            raise RuntimeError("not me")

    net = Stubborn()
    probe = Probe(ScoreNetwork(net))
    before = trained(net, sigma=torch.ones(16, 1))
    with caplog.at_level(logging.WARNING):
        made = encode("int8", ScoreNetwork(net).state_dict(), Decoded(before, ()), probe)
    assert made.codec_error is None
    assert "not measured: RuntimeError: not me" in caplog.text


@pytest.mark.parametrize(("bound", "expected"), [("auto:0.5", "int4"), ("auto:0.000001", "exact")])
def test_auto_takes_the_smallest_codec_under_its_bound(bound, expected):
    net = Score(width=64)
    probe = Probe(ScoreNetwork(net))
    before = trained(net, sigma=torch.ones(16, 1))
    made = encode(bound, ScoreNetwork(net).state_dict(), Decoded(before, ()), probe)
    assert made.codec == expected
    assert made.codec_error <= float(bound.partition(":")[2])


def test_auto_tries_from_the_smallest_on_and_stops_at_the_first_that_fits():
    net = Score(width=64)
    probe = Probe(ScoreNetwork(net))
    before = trained(net, sigma=torch.ones(16, 1))
    state, previous = ScoreNetwork(net).state_dict(), Decoded(before, ())
    errors = {codec: encode(codec, state, previous, probe).codec_error for codec in SMALLEST_FIRST}
    for bound in (0.1, 0.01, 0.001):
        expected = next(codec for codec in SMALLEST_FIRST if errors[codec] <= bound)
        assert encode(f"auto:{bound}", state, previous, probe).codec == expected


def test_the_manifest_says_codec_and_errors_of_each_node(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=6, every=2, codec="int6") as handle:
        run.steps(7)
        nodes = handle.path.nodes
    assert [node.codec for node in nodes] == ["int6"] * 3
    assert all(0 < node.codec_error < 0.1 and 0 < node.weight_error < 0.05 for node in nodes)
    assert not run.fake_score._forward_pre_hooks
    card = (tmp_path / "README.md").read_text()
    assert all(node.checksum[:12] in card for node in nodes)


def test_a_loop_that_never_calls_the_network_as_a_module_says_not_measured(tmp_path):
    run = Run()

    def fake_step():
        run.optimizer_f.zero_grad()
        run.fake_score.forward(run.randn(8, 2), torch.ones(8, 1)).square().sum().backward()
        run.optimizer_f.step()

    path = disback.record(run.teacher, run.fake_score, fake_step, path=tmp_path, iterations=2, every=1)
    assert [node.codec_error for node in path.nodes] == [None, None]
    assert "not measured" in (tmp_path / "README.md").read_text()


def test_the_trainers_own_hooks_are_neither_run_nor_copied_with_all_that_they_hold():
    class Trainer:
        calls = 0

        def hook(self, *_):
            self.calls += 1

        def __deepcopy__(self, memo):
            pytest.fail("the trainer was copied")

    trainer, net = Trainer(), Score()
    net.inner.register_forward_hook(trainer.hook)
    net.register_forward_pre_hook(trainer.hook)
    probe = Probe(ScoreNetwork(net))
    net(torch.randn(8, 2), torch.ones(8, 1))
    before = trainer.calls
    assert probe.outputs()[0].shape == (8, 2)
    assert trainer.calls == before
    assert net.inner._forward_hooks


def test_a_forward_that_was_replaced_is_not_run_behind_the_trainers_back(caplog):
    net = Score()
    probe = Probe(ScoreNetwork(net))
    forward = net.forward
    net.forward = lambda *a, **k: forward(*a, **k)  # a copy of it would run this very network
    before = trained(net, sigma=torch.ones(16, 1))
    statistics = clone(dict(net.state_dict()))
    with caplog.at_level(logging.WARNING):
        made = encode("int8", ScoreNetwork(net).state_dict(), Decoded(before, ()), probe)
    assert made.codec_error is None
    assert "forward was replaced" in caplog.text
    assert difference(dict(net.state_dict()), statistics) == []


def test_random_numbers_that_a_network_draws_even_in_evaluation_are_its_own():
    class Noisy(Score):
        def forward(self, x, sigma):
            return super().forward(x + torch.randn_like(x), sigma)

    net = Noisy()
    probe = Probe(ScoreNetwork(net))
    net(torch.randn(8, 2), torch.ones(8, 1))
    before = torch.get_rng_state()
    probe.outputs()
    assert torch.equal(torch.get_rng_state(), before)


def test_running_statistics_are_stored_exactly_and_a_path_that_narrows_them_stays_sound(tmp_path):
    run = Run()
    with torch.no_grad():
        for _ in range(30):
            run.fake_score(100 * torch.randn(64, 2), torch.ones(64, 1))
    run.teacher.load_state_dict(run.fake_score.state_dict())

    def fake_step():
        run.optimizer_f.zero_grad()
        run.fake_score(1e-3 * run.randn(64, 2), torch.ones(64, 1)).square().sum().backward()
        run.optimizer_f.step()

    path = disback.record(run.teacher, run.fake_score, fake_step, path=tmp_path, iterations=60, every=20, codec="int4")
    path.verify()
    live = dict(run.fake_score.named_buffers())
    for name in ("inner.1.running_var", "inner.1.running_mean"):
        assert torch.equal(path[3][name], live[name])
        assert (path[1]["inner.1.running_var"] > 0).all()


def test_a_node_that_would_overflow_its_dtype_is_stored_exactly():
    before = {"w": torch.full((256,), 60000.0).half()}
    state = {"w": before["w"] + torch.linspace(-4000, 5504, 256).half()}
    made = encode("int4", state, Decoded(before, ()))
    found = Decoded(before, [made.delta]).state_dict()["w"]
    assert found.isfinite().all()
    assert made.weight_error < 0.2


def test_a_buffer_that_is_a_slice_of_another_is_what_was_recorded():
    storage = torch.randn(1000)
    before = {"whole": storage.clone()}
    before["part"] = before["whole"][10:500]
    state = {"whole": storage + torch.randn(1000)}
    state["part"] = state["whole"][10:500]
    made = encode("int4", state, Decoded(before, ()))
    found = Decoded(before, [made.delta]).state_dict()
    assert torch.equal(found["part"], found["whole"][10:500])


def test_complex_weights_that_moved_are_recorded():
    before = {"w": torch.zeros(8, dtype=torch.complex64)}
    made = encode("int8", {"w": before["w"] + 3j}, Decoded(before, ()))
    assert made.delta_norm == pytest.approx(3 * 8**0.5)


def test_recording_with_a_probe_is_the_run_without_one_bit_for_bit(tmp_path):
    paths = []
    for codec in ("exact", "auto"):
        run = Run()
        with disback.attach(**run.roles(), path=tmp_path / codec, record=6, every=2, codec=codec):
            run.steps(6)
            paths.append(run.checkpoint())
    assert difference(*paths) == []


def test_a_network_that_is_copied_or_saved_whole_while_it_is_watched_carries_nothing_of_the_probe_along(tmp_path):
    run = Run()
    probe = Probe(ScoreNetwork(run.fake_score))
    torch.save(run.fake_score, tmp_path / "whole.pt")  # as Diff-Instruct's and SiD's snapshots do
    script = f"import sys, torch; torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=TESTS, check=True, capture_output=True, text=True)
    assert "disback_plugin.path.probes" not in loaded.stdout.split()
    copy.deepcopy(run.fake_score)(torch.ones(2, 2), torch.ones(2, 1))
    assert not probe.ready
    run.fake_score(torch.ones(2, 2), torch.ones(2, 1))
    assert probe.ready
    probe.close()
