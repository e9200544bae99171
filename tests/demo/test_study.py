"""The demonstration, cut to a few updates, through its command."""

from __future__ import annotations

import json

import pytest

from disback_plugin import cli
from disback_plugin.demo import study, trainer
from disback_plugin.schedules import Ramp


@pytest.fixture
def short(monkeypatch):
    """The regime of each command, cut to a few updates."""
    whole, cut = study.regime_of, {"updates": 6, "record": 4, "every": 2, "evaluate_every": 2, "samples": 100}
    monkeypatch.setattr(study, "regime_of", lambda *of, **more: whole(*of, **cut, schedule=Ramp(3), **more))


def test_the_demo_writes_what_it_says_and_prints_one_json_object(short, tmp_path, capsys):
    assert cli.main(["demo", "--seeds", "2", "--json", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "convergence.png", "diff-instruct.log.jsonl", "disback.log.jsonl", "grad-ramp.log.jsonl", "path", "result.json",
        "samples", "samples.png", "warm.log.jsonl",
    ]  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["seeds"] == 2
    assert list(result["runs"]) == ["diff-instruct", "warm", "grad-ramp", "disback"]
    names = [f"{threshold:g}" for threshold in result["thresholds"]]
    for ratio in (result["ratio_updates"], result["ratio_compute"]):
        assert list(ratio) == names
        assert all(value.keys() == {"median", "min", "max"} for value in ratio.values())
    for final in (result["final"], result["final_raw"]):
        assert final.keys() == result["runs"].keys()
    assert result["runs"]["disback"]["recording_iterations"] == 4
    assert result["runs"]["grad-ramp"]["recording_iterations"] == 0
    assert result["seconds"] > 0


def test_the_demo_prints_a_table_and_its_caveat_and_can_be_run_again(short, tmp_path, capsys):
    for _ in range(2):
        assert cli.main(["demo", "--seeds", "1", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "diff-instruct" in printed
        assert "other regimes gain less or lose" in printed


def test_a_seed_does_not_depend_on_the_company_it_keeps(short, tmp_path, capsys):
    curves = []
    for seeds in ("1", "3"):
        cli.main(["demo", "--seeds", seeds, "--json", "--out", str(tmp_path / seeds)])
        runs = json.loads(capsys.readouterr().out)["runs"]
        curves.append([[values[0] for values in run["curve"]["raw"]] for run in runs.values()])
    for alone, together in zip(*curves, strict=True):
        assert alone == pytest.approx(together, rel=1e-2)


def test_the_four_runs_start_alike_and_the_trainer_without_disback_is_untouched(short, tmp_path):
    regime = study.regime_of("mlp", "scratch")
    runs = study.Study(regime, [7], tmp_path).run_all()
    assert len({run.raw[0][0] for run in runs.values()}) == 1
    plain = trainer.Trainer(regime, [7])
    for _ in range(regime.updates):
        plain.step()
    assert study.Study(regime, [7], tmp_path)._distances(plain.generator) == runs["diff-instruct"].raw[-1]
    assert runs["disback"].raw[-1] != runs["warm"].raw[-1] != runs["diff-instruct"].raw[-1]


@pytest.mark.parametrize("loss", ["dmd", "sid"])
def test_each_loss_has_its_own_baseline_and_settings(loss, short, tmp_path, monkeypatch, capsys):
    assert study.regime_of("mlp", "far", loss).rate == study.RATES["mlp", "far"][loss][0]
    monkeypatch.setattr(trainer, "FAR", 3)
    assert cli.main(["demo", "--loss", loss, "--student", "far", "--seeds", "2", "--json", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["runs"]) == [loss, "warm", "grad-ramp", "disback"]
    assert (result["loss"], result["student"]) == (loss, "far")
    first, *others = (run["curve"]["raw"][0] for run in result["runs"].values())
    assert all(other == first for other in others), "all runs begin with the same student"
    ends = [run["curve"]["raw"][-1] for run in result["runs"].values()]
    assert len({tuple(end) for end in ends}) == 4


def test_the_three_losses_train_differently():
    ends = {}
    for loss in trainer.LOSSES:
        plain = trainer.Trainer(study.regime_of("mlp", "teacher", loss, rate=1e-3, batch=8), [0])
        plain.step()
        plain.step()
        ends[loss] = plain.generator.body.last.weight.detach().clone()
    assert len({tuple(end.flatten().tolist()) for end in ends.values()}) == 3


def test_the_log_of_each_run_of_the_demo_makes_a_report(short, tmp_path, capsys):
    assert cli.main(["demo", "--seeds", "1", "--json", "--out", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in told["runs"]] == ["diff-instruct", "warm", "grad-ramp", "disback"]
    last = {row["run"]: row["last"] for row in told["comparison"] if row["measure"] == "distance"}
    assert last == pytest.approx(result["final"], rel=1e-6)
    page = (tmp_path / "report.html").read_text()
    for title in ("position", "gradient agreement", "loss of s_phi", "codec error"):
        assert title in page
    assert page.count("data:image/png") == sum(1 for _ in (tmp_path / "samples").iterdir()) > 4


def test_a_folder_in_the_way_is_exit_code_1_and_left_alone(short, tmp_path, capsys):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "notes.txt").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "notes.txt" in capsys.readouterr().err
    assert (tmp_path / "path" / "notes.txt").read_text() == "mine"
