"""`disback record`, on networks that a function builds."""

from __future__ import annotations

import json
import os
import sys
import tempfile

import pytest

from disback_plugin import DegradationPath, cli

NETWORKS = """
import torch
from torch import nn

torch.manual_seed(0)
teacher, fake_score, student = (nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(3))
total = sum(weight.double().sum().item() for weight in teacher.parameters())

def loss(net, x_0):
    return (net(x_0 + torch.randn_like(x_0)) - x_0).square().mean()

def sample():
    return student(torch.randn(16, 2)).detach()

def alone():
    return {"teacher": teacher, "sample": sample, "loss": loss}

def with_fake_score():
    optimizer = torch.optim.Adam(fake_score.parameters(), lr=0.01)
    def fake_step():
        import late  # of the same folder, only now
        optimizer.zero_grad()
        loss(fake_score, sample()).backward()
        optimizer.step()
    return {"teacher": teacher, "fake_score": fake_score, "fake_step": fake_step}

def noise():
    def loss(net, x_0):  # gradients of one update and the next agree in nothing
        return (net(x_0) * torch.randn(16, 2)).sum()
    return {"teacher": teacher, "sample": lambda: torch.randn(16, 2), "loss": loss}

def breaks():
    raise RuntimeError("no weights here")

def forgets():
    return {"teacher": teacher, "sample": sample}

def swaps():
    return {"teacher": teacher, "sample": sample(), "loss": loss}

def nothing():
    pass

number = 3
"""
WEIGHTS = 4 * (2 * 8 + 8 + 8 * 2 + 2)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of networks in the working folder, which only the command makes importable."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "late.py").write_text("")
    name = "networks_of_a_test"
    (tmp_path / f"{name}.py").write_text(NETWORKS)
    (tmp_path / "broken_module.py").write_text("import a_package_that_is_not_there\n")
    yield name
    for imported in (name, "late", "broken_module"):
        sys.modules.pop(imported, None)


@pytest.mark.parametrize("build", ["alone", "with_fake_score"])
def test_both_kinds_of_networks_are_recorded_and_their_path_described(module, build, capsys):
    before = list(sys.path)
    options = ("--path", "path", "--iterations", "4", "--every", "2", "--codec", "exact")
    assert cli.main(["record", f"{module}:{build}", *options, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "", "no progress bar off a terminal"
    told = json.loads(out)
    assert [node["iteration"] for node in told["nodes"]] == [0, 2, 4]
    assert (told["complete"], told["codec"], told["iterations"]) == (True, "exact", 4)
    assert len(DegradationPath.from_pretrained("path")) == 3
    assert sys.path == before
    assert cli.main(["record", f"{module}:{build}", *options]) == 0, "a finished path is shown"
    assert "complete, codec exact" in capsys.readouterr().out


def test_a_learning_rate_and_a_path_without_the_teacher(module, capsys):
    ends = []
    for rate in ("1e-3", "1e-2"):
        options = ("--iterations", "2", "--every", "2", "--learning-rate", rate, "--no-keep-teacher")
        assert cli.main(["record", f"{module}:alone", "--path", rate, *options, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["nodes"][0]["bytes"] == 0
        ends.append(DegradationPath.from_pretrained(rate).nodes[-1].delta_norm)
    assert ends[1] > 5 * ends[0]
    assert cli.main(["record", f"{module}:with_fake_score", "--path", "p", "--learning-rate", "1"]) == 2
    assert "an optimizer of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("networks", "found no function networks; expected pkg.module:build"),
        ("networks.py:build", "no function networks.py:build"),
        ("no_such_module:build", "no function no_such_module:build"),
        ("networks_of_a_test:absent", "no function networks_of_a_test:absent"),
        ("networks_of_a_test:number", "no function networks_of_a_test:number"),
        ("networks_of_a_test:forgets", "found ['sample', 'teacher'] from networks_of_a_test:forgets()"),
        ("networks_of_a_test:nothing", "found NoneType from"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_exit_code_2(module, target, message, capsys):
    assert cli.main(["record", target, "--path", "path"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("disback: found ")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "error"),
    [("broken_module:build", ModuleNotFoundError), ("networks_of_a_test:breaks", RuntimeError),
     ("networks_of_a_test:swaps", TypeError)],
)  # fmt: skip
def test_errors_of_the_users_own_code_keep_their_traceback(module, target, error):
    with pytest.raises(error):
        cli.main(["record", target, "--path", "path"])


@pytest.mark.parametrize("build", ["alone", "with_fake_score"])
def test_a_dry_run_measures_and_keeps_nothing(build, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(os.listdir(tmp_path))
    options = ("record", f"{module}:{build}", "--dry-run", "--iterations", "40", "--every", "8", "--codec", "exact")
    rate = ("--learning-rate", "0.01") if build == "alone" else ()
    assert cli.main([*options, *rate, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fitted"] is None or found["fitted"] <= found["iterations"] < 40
    assert (found["nodes"], found["iterations"] % 5) == (5, 0)
    assert found["node_bytes"] >= WEIGHTS
    assert found["path_bytes"] == 5 * found["node_bytes"] + WEIGHTS
    assert min(found["iteration_seconds"], found["move_seconds"]) > 0 <= found["write_seconds"]
    teacher = sys.modules[module].teacher
    assert sum(weight.double().sum().item() for weight in teacher.parameters()) == sys.modules[module].total
    assert [name for name in sorted(os.listdir(tmp_path)) if name != "__pycache__"] == before
    assert cli.main([*options, "--no-keep-teacher"]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (shown["nodes"], shown["path_bytes"]) == ("5", str(5 * found["node_bytes"]))


def test_a_dry_run_of_a_fitted_network_ends_early_and_a_short_one_is_refused(module, capsys):
    assert cli.main(["record", f"{module}:noise", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fitted"] == found["iterations"] < 200
    assert cli.main(["record", f"{module}:noise", "--dry-run", "--iterations", "9"]) == 2
    assert "at least 10 with --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("target", [(), ("--path", "path", "--dry-run")])
def test_a_path_or_a_dry_run_is_asked_for_and_not_both(module, target, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["record", f"{module}:alone", *target])
