from __future__ import annotations

import json
import subprocess
import sys

import pytest

from disback_plugin import cli
from disback_plugin.demo import study, trainer
from disback_plugin.schedules import Ramp


def disback(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "disback_plugin.cli", *arguments], capture_output=True, text=True, check=False, **options
    )


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


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["demo", "--seeds", "x"], ["demo", "--network", "unet"], ["demo", "--seed", "3"]],
)
def test_wrong_use_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: disback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "found --seeds 0; expected a number >= 1"),
        (["--schedule", "cosine"], "found schedule 'cosine'"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    assert cli.main(["demo", *arguments, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"disback: {message}")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_in_the_way_is_exit_code_1_and_left_alone(short, tmp_path, capsys):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "notes.txt").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert "notes.txt" in capsys.readouterr().err
    assert (tmp_path / "path" / "notes.txt").read_text() == "mine"


def test_debug_shows_the_traceback(tmp_path):
    out = disback("--debug", "demo", "--seeds", "0", "--out", str(tmp_path / "out"))
    assert "Traceback" in out.stderr
    assert out.returncode == 1


def test_the_command_is_installed_and_knows_its_version():
    from importlib.metadata import entry_points, version

    (script,) = entry_points(group="console_scripts", name="disback")
    assert script.load() is cli.main
    assert disback("--version").stdout.strip() == f"disback-plugin {version('disback-plugin')}"


PLUGINS = """
import sys, time
start = time.process_time()
from disback_plugin import cli
code = cli.main({arguments!r})
print("seconds", time.process_time() - start, file=sys.stderr)
print("modules", *sys.modules, file=sys.stderr)
sys.exit(code)
"""


def plugins(*arguments):
    """The command in a process of its own: its output, its seconds, and what it imported."""
    script = PLUGINS.format(arguments=["plugins", *arguments])
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, modules = (line.split()[1:] for line in out.stderr.splitlines())
    return out.stdout, float(seconds[0]), set(modules)


def test_the_plug_ins_are_listed_in_no_time_and_without_importing_any_of_them():
    runs = [plugins() for _ in range(3)]
    printed, _, modules = runs[0]
    assert modules.isdisjoint({"torch", "numpy", "diffusers", "accelerate", "timm", "disback_adapters"})
    assert min(seconds for _, seconds, _ in runs) < 0.3
    header, *rows = printed.splitlines()
    assert header.split()[:3] == ["name", "distribution", "group"]
    assert any(row.split()[:2] == ["dmd2", "disback-plugin"] and "installed" in row for row in rows)


def test_a_bug_report_has_the_versions_and_imports_nothing_for_them():
    from importlib.metadata import version

    printed, _, modules = plugins("--env", "--json")
    assert modules.isdisjoint({"torch", "diffusers", "accelerate", "timm"})
    found = json.loads(printed)["environment"]
    for name in ("torch", "diffusers", "accelerate", "timm", "pluggy"):
        assert found[name] == version(name)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_check_imports_each_and_says_what_it_hooks_and_what_is_broken(tmp_path, monkeypatch, capsys, caplog):
    from sites import install

    install(tmp_path, "theirs", "raise RuntimeError('no GPU here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["plugins", "--json"]) == 0
    listed = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)["plugins"]}
    assert listed["theirs"]["status"] == listed["dmd2"]["status"] == "installed"
    assert cli.main(["plugins", "--check", "--json"]) == 1
    checked = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)["plugins"]}
    assert (checked["dmd2"]["status"], checked["dmd2"]["hooks"]) == ("ready", ["disback_adapter"])
    theirs = checked["theirs"]
    assert (theirs["status"], theirs["reason"]) == ("broken", "RuntimeError: no GPU here")
    assert (theirs["distribution"], theirs["version"]) == ("disback-theirs", "1.0")
    assert cli.main(["-p", "no:theirs", "plugins", "--check"]) == 0
    assert "by no:theirs" in capsys.readouterr().out
    assert not caplog.records, "the table says it"
    assert cli.main(["-p", "theirs", "plugins"]) == 1
    assert "no GPU here" in capsys.readouterr().err
    assert cli.main(["-p", "nobody", "plugins"]) == 2


def test_help_names_the_commands_and_is_formatted_at_any_width(monkeypatch, capsys):
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            cli.main(["--help"])
        assert "plugins" in capsys.readouterr().out
