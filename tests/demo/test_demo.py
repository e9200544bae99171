"""The demonstration, cut to a few rounds, through its command."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3

from disback_plugin import cli, demo
from disback_plugin.demo import trainer
from disback_plugin.demo.networks import load_teacher
from disback_plugin.schedules import Ramp


@pytest.fixture
def short(monkeypatch):
    """The regime of each command, cut to a few rounds."""
    whole = trainer.regime_of
    monkeypatch.setattr(demo, "regime_of", lambda *of: replace(whole(*of), rounds=8))
    for name, value in {"RECORD": 4, "EVALUATE_EVERY": 2, "SAMPLES": 100}.items():
        monkeypatch.setattr(demo, name, value)


def run(out, capsys, *arguments):
    """Run the command, and return its result."""
    assert cli.main(["demo", "--json", "--out", str(out), "--schedule", "ramp:3", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_demo_writes_its_files_and_prints_one_json_object(short, tmp_path, capsys):
    result = run(tmp_path, capsys, "--seeds", "2")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "convergence.png", "diff-instruct.log.jsonl", "disback.log.jsonl", "grad-ramp.log.jsonl", "path", "result.json",
        "samples.png", "warm.log.jsonl",
    ]  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["seeds"] == 2
    assert list(result["runs"]) == ["diff-instruct", "warm", "grad-ramp", "disback"]
    for name, recorded in {"disback": 4, "warm": 4, "grad-ramp": 0, "diff-instruct": 0}.items():
        found = result["runs"][name]
        assert found["recorded"] == recorded
        assert found["rounds"][0] == math.ceil(recorded * 4 / 9)
        assert found["rounds"][-1] == 8, "all runs end at equal compute"
        assert all(len(values) == 2 for values in found["distance"])
    assert result["runs"]["diff-instruct"]["rounds_to_baseline"] is not None


def test_by_default_the_schedule_is_auto_and_the_demo_can_be_run_again(short, tmp_path, capsys):
    for _ in range(2):
        assert cli.main(["demo", "--seeds", "1", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "diff-instruct" in printed
        assert "other regimes gain less or lose" in printed
    assert json.loads((tmp_path / "result.json").read_text())["schedule"] == "auto"


@pytest.mark.slow
def test_a_seed_does_not_depend_on_the_other_seeds(short, tmp_path, capsys):
    curves = []
    for seeds in ("1", "3"):
        runs = run(tmp_path / seeds, capsys, "--seeds", seeds)["runs"]
        curves.append([[values[0] for values in found["distance"]] for found in runs.values()])
    for alone, together in zip(*curves, strict=True):
        assert alone == pytest.approx(together, rel=1e-2)


def test_the_four_runs_start_alike_and_the_trainer_without_disback_is_untouched(short, tmp_path):
    regime = demo.regime_of("mlp", "scratch")
    study = demo.Study(regime, [7], tmp_path)
    runs = study.distil_all(Ramp(3))
    assert len({found.distance[0][0] for found in runs.values()}) == 1
    plain = trainer.Trainer(regime, [7])
    average = ModelEmaV3(plain.generator, decay=demo.EMA)
    for _ in range(regime.rounds):
        plain.step()
        average.update(plain.generator)
    assert study.distances(average.module) == runs["diff-instruct"].distance[-1]
    assert runs["disback"].distance[-1] != runs["warm"].distance[-1] != runs["diff-instruct"].distance[-1]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dmd", "sid"])
def test_each_loss_has_its_own_baseline(loss, short, tmp_path, capsys):
    result = run(tmp_path, capsys, "--loss", loss, "--student", "far", "--seeds", "2")
    assert list(result["runs"]) == [loss, "warm", "grad-ramp", "disback"]
    assert (result["loss"], result["student"]) == (loss, "far")
    first, *others = (found["distance"][0] for found in result["runs"].values())
    assert all(other == first for other in others), "all runs begin with the same student"
    ends = [found["distance"][-1] for found in result["runs"].values()]
    assert len({tuple(end) for end in ends}) == 4


def test_the_three_losses_train_differently():
    ends = set()
    for loss in trainer.LOSSES:
        plain = trainer.Trainer(replace(trainer.regime_of("mlp", "teacher", loss), batch=8), [0])
        plain.step()
        ends.add(tuple(plain.generator.body.last.weight.flatten().tolist()))
    assert len(ends) == 3


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_far_student_denoises_negatives(network):
    far = trainer.first_student(trainer.regime_of(network, "far"), [0])
    teacher, x_t, sigma = load_teacher(network, 1), torch.randn(1, 4, 64), torch.tensor(0.5)
    with torch.no_grad():
        torch.testing.assert_close(far(x_t, sigma), -teacher(-x_t, sigma))


@pytest.mark.slow
def test_the_log_of_each_run_of_the_demo_makes_a_report(short, tmp_path, capsys):
    result = run(tmp_path, capsys, "--seeds", "1")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report.html"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [found["run"] for found in report["runs"]] == ["diff-instruct", "warm", "grad-ramp", "disback"]
    last = {row["run"]: row["last"] for row in report["comparison"] if row["measure"] == "distance"}
    assert last == pytest.approx({name: found["final"] for name, found in result["runs"].items()}, rel=1e-6)
    page = (tmp_path / "report.html").read_text()
    for title in ("position", "gradient agreement", "loss of s_phi"):
        assert title in page


def test_a_folder_in_the_way_is_exit_code_1_and_left_alone(short, tmp_path, capsys):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "notes.txt").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "notes.txt" in capsys.readouterr().err
    assert (tmp_path / "path" / "notes.txt").read_text() == "mine"
