"""The demonstration, cut to a few rounds, through its command."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace
from statistics import median

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3

import disback_plugin as disback
from disback_plugin import cli, demo
from disback_plugin.demo import trainer
from disback_plugin.demo.worlds import load_teacher
from disback_plugin.metrics import sliced_wasserstein
from disback_plugin.schedules import Ramp

DEFAULT = inspect.signature(disback.attach).parameters["schedule"].default
CONTROLS = ["warm start", "gradient ramp, no path", "Diff-Instruct at 1.25 times the rate"]


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
    names = ["Diff-Instruct", "DisBack (ramp:3)", *CONTROLS]
    assert {file.name for file in tmp_path.iterdir()} == {
        "convergence.png", "path", "result.json", "samples.png", *(f"{name}.log.jsonl" for name in names)
    }  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["seeds"] == 2
    assert list(result["runs"]) == names
    for name, found in result["runs"].items():
        assert found["recorded"] == (4 if name in ("DisBack (ramp:3)", "warm start") else 0)
        assert found["rounds"] == [0, 2, 4, 6, 8], "a recording takes rounds of the same loop"
        assert all(len(values) == 2 for values in (*found["distance"], *found["mismatch"]))


def test_every_row_has_medians_of_ratios_to_the_baseline_seed_by_seed(short, tmp_path, capsys):
    runs = run(tmp_path, capsys, "--seeds", "3", "--world", "gaussians")["runs"]
    base = runs["Diff-Instruct"]["distance"][-1]
    for found in runs.values():
        ratios = [a / b for a, b in zip(found["distance"][-1], base, strict=True)]
        assert (found["ratio"], found["range"]) == (median(ratios), [min(ratios), max(ratios)])
        assert found["rounds_ratio"] is None or found["rounds_ratio"] > 0
    assert runs["Diff-Instruct"]["ratio"] == runs["Diff-Instruct"]["rounds_ratio"] == 1


@pytest.mark.parametrize(
    "arguments",
    [[], pytest.param(["--world", "gaussians", "--student", "teacher"], marks=pytest.mark.slow)],
    ids=["digits", "plane"],
)
def test_without_an_option_the_schedule_is_the_packages_default_and_the_demo_can_be_run_again(
    arguments, short, tmp_path, capsys
):
    for schedule in (["--schedule", "ramp:3"], []):
        assert cli.main(["demo", "--seeds", "1", "--out", str(tmp_path), *schedule, *arguments]) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith("Loading PyTorch")
    assert f"DisBack ({DEFAULT})" in captured.out
    assert "Other regimes gain less or lose" in captured.out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["schedule"] == DEFAULT
    assert sorted(file.name for file in tmp_path.glob("*.jsonl")) == sorted(
        f"{name}.log.jsonl" for name in result["runs"]
    )


@pytest.mark.slow
def test_a_seed_does_not_depend_on_the_other_seeds(short, tmp_path, capsys):
    curves = []
    for seeds in ("1", "3"):
        runs = run(tmp_path / seeds, capsys, "--seeds", seeds)["runs"]
        curves.append([[values[0] for values in found["distance"]] for found in runs.values()])
    for alone, together in zip(*curves, strict=True):
        assert alone == pytest.approx(together, rel=1e-2)


def test_the_runs_start_alike_and_the_trainer_without_disback_is_untouched(short, tmp_path):
    regime = demo.regime_of("digits", "scratch")
    study = demo.Study(regime, [7], tmp_path)
    runs = study.distil_all(Ramp(3), "DisBack")
    assert len({found.distance[0][0] for found in runs.values()}) == 1
    plain = trainer.Trainer(regime, [7])
    average = ModelEmaV3(plain.generator, decay=demo.EMA)
    for _ in range(regime.rounds):
        plain.step()
        average.update(plain.generator)
    with torch.no_grad():
        samples = trainer.generate(average.module, study._z, regime)[0]
    assert runs["Diff-Instruct"].distance[-1] == [study._distance(samples)]
    assert runs["Diff-Instruct"].mismatch[-1] == [study.mismatch(samples)]
    assert len({found.distance[-1][0] for found in runs.values()}) == len(runs)


def test_a_default_without_backtracking_is_not_its_own_control(short, tmp_path):
    study = demo.Study(demo.regime_of("gaussians", "scratch"), [0], tmp_path)
    assert list(study.distil_all(demo.WarmStart(), "DisBack (warm)")) == [
        "Diff-Instruct",
        "DisBack (warm)",
        *CONTROLS[1:],
    ]


@pytest.mark.parametrize("world", trainer.RATES)
def test_a_far_student_denoises_negatives(world):
    regime = trainer.regime_of(world, "far")
    far, teacher = trainer.first_student(regime, [0]), load_teacher(world, 1)
    x_t, sigma = torch.randn(1, 4, regime.size), torch.tensor(0.5)
    with torch.no_grad():
        torch.testing.assert_close(far(x_t, sigma), -teacher(-x_t, sigma))


def test_in_the_plane_the_teacher_knows_the_gaussians_and_its_directions_lead_to_them(tmp_path):
    study = demo.Study(trainer.regime_of("gaussians", "scratch"), [0], tmp_path)
    x_t = demo.figures.GRID
    reached = x_t + study.directions(study.teacher)
    far = torch.cdist(x_t, study.data).amin(1) > 2
    assert (torch.cdist(reached, study.data).amin(1) < torch.cdist(x_t, study.data).amin(1))[far].all()
    sigma = torch.logspace(1.5, -1.3, 20)
    x = sigma[0] * torch.randn(1, 1_000, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for high, low in zip(sigma, [*sigma[1:], torch.tensor(0.0)], strict=True):  # Euler's steps of the flow
            clean = study.teacher(x, high)
            x = clean + low / high * (x - clean)
    assert torch.cdist(x[0], study.data).amin(1).mean() < 0.1
    assert sliced_wasserstein(x[0], study.data) < 0.5
    assert study.floor() < 0.1 < study.mismatch(-study.data[:1_000])


@pytest.mark.slow
def test_the_log_of_each_run_of_the_demo_makes_a_report(short, tmp_path, capsys):
    result = run(tmp_path, capsys, "--seeds", "1")
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report.html"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [found["run"] for found in report["runs"]] == list(result["runs"])
    for measure in ("distance", "mismatch"):
        last = {row["run"]: row["last"] for row in report["comparison"] if row["measure"] == measure}
        assert last == pytest.approx({name: found[measure][-1][0] for name, found in result["runs"].items()}, rel=1e-6)
    page = (tmp_path / "report.html").read_text()
    for title in ("position", "gradient agreement", "loss of s_phi"):
        assert title in page


def test_a_folder_in_the_way_is_exit_code_1_and_left_alone(short, tmp_path, capsys):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "notes.txt").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path), "--seeds", "1"]) == 1
    assert "notes.txt" in capsys.readouterr().err
    assert (tmp_path / "path" / "notes.txt").read_text() == "mine"


def test_without_matplotlib_the_error_comes_before_the_training(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["demo", "--seeds", "1", "--out", str(tmp_path / "out")]) == 2
    assert "no matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
