"""The DMD2 task of DiffSynth-Studio, whose one module holds teacher, fake score, student and discriminator."""

from __future__ import annotations

import json

import pytest
import torch
from scripts import PLAN, TRAINERS, disback_run, networks
from worlds import difference

import disback_plugin as disback


@pytest.fixture
def run(tmp_path, capsys):
    """Run the script; return its exit code and what it said."""

    def run(*arguments, out="out", options=PLAN):
        folder = tmp_path / out
        folder.mkdir(exist_ok=True)
        options = ("--adapter", "diffsynth", "--path", tmp_path / "path", *options)
        code = disback_run(*options, TRAINERS / "diffsynth_train.py", "--output_path", folder, *arguments)
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("gan", [0.0, 0.3])
def test_the_discriminator_keeps_its_features_while_the_score_moves(gan, run, tmp_path):
    code, errors = run("--gan", gan)
    assert code == 0, errors
    assert "disback: ended: <disback done: position 0 (N = 3" in errors
    assert ("the discriminator keeps the features" in errors) is (gan > 0)
    path = disback.DegradationPath(tmp_path / "path")
    assert [node.iteration for node in path.nodes] == [2, 4, 6]
    assert difference(networks(tmp_path / "out")[0], path[0]) == []
    seen, _, own = torch.load(tmp_path / "out" / "seen.pt")
    assert own, "the function is the script's own at the end"
    assert len(seen) == 40 * (gan > 0)
    for x, sigma, features in seen:
        weight, bias = path[0]["inner.0.weight"], path[0]["inner.0.bias"]
        expected = torch.nn.functional.linear(torch.cat([x, sigma], dim=1), weight, bias).tanh()
        assert torch.equal(features, expected)


def test_without_the_copy_the_features_are_the_active_nodes(run, tmp_path):
    code, errors = run("--gan", 0.3, options=(*PLAN, "-p", "no:teacher_features"))
    assert code == 0, errors
    assert "keeps the features" not in errors
    path = disback.DegradationPath(tmp_path / "path")
    moved = 0
    for x, sigma, features in torch.load(tmp_path / "out" / "seen.pt")[0]:
        weight, bias = path[0]["inner.0.weight"], path[0]["inner.0.bias"]
        moved += not torch.equal(
            features, torch.nn.functional.linear(torch.cat([x, sigma], dim=1), weight, bias).tanh()
        )
    assert moved == 8, "two generator updates a node and their fake-score updates, on two nodes"


@pytest.mark.parametrize(("at", "phase"), [(5, "recording"), (18, "backtracking")])
def test_a_checkpoint_of_all_networks_holds_the_teacher_and_is_resumed(at, phase, run, tmp_path):
    options = (*PLAN, "--schedule", "fixed:4,4")
    code, errors = run("--gan", 0.3, "--iterations", at, "--save_steps", at, options=options)
    assert code == 0, errors
    saved = tmp_path / "out" / f"step-{at}.pt"
    state = torch.load(saved)
    path = disback.DegradationPath(tmp_path / "path")
    teacher = {k.removeprefix("pipe.dit_teacher."): v for k, v in state.items() if k.startswith("pipe.dit_teacher.")}
    assert difference(teacher, path[0]) == []
    (line,) = map(json.loads, (tmp_path / "path.states.jsonl").read_text().splitlines())
    assert line["phase"] == phase
    code, errors = run("--gan", 0.3, "--resume_from_checkpoint", saved, out="rest", options=options)
    assert code == 0, errors
    begun = errors[errors.index("attached to") :]
    assert f"<disback {phase}" in begun.splitlines()[0]
    assert f"{line['generator_updates']} generator updates, {line['fake_score_updates']} fake-score updates" in begun
    assert "disback: ended: <disback done" in errors


def test_options_that_never_train_the_fake_score_are_refused(run, tmp_path):
    code, errors = run("--freq", 1)
    assert code == 2
    assert "--dmd2_student_update_freq 1, with which the fake score is never trained" in errors
    assert not (tmp_path / "path").exists()
