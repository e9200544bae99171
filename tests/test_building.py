"""`pkg.module:build` on the command line, and `disback record`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from disback_plugin import DegradationPath, cli
from disback_plugin.entry_function import built
from disback_plugin.errors import OptionError, RoleError

NETWORKS = """
import torch
from torch import nn

torch.manual_seed(0)
teacher, fake_score, student = (nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(3))

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


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of networks in the working folder, which only `built` makes importable."""
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
    told = json.loads(capsys.readouterr().out)
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
    ("target", "error", "message"),
    [
        ("networks", OptionError, "found 'networks'; expected a module and a function in it"),
        ("networks.py:build", OptionError, "write train.networks:build"),
        ("no_such_module:build", OptionError, "found no module no_such_module"),
        ("broken_module:build", OptionError, r"raised ModuleNotFoundError.*broken_module.py:1\)"),
        ("networks_of_a_test:absent", OptionError, "no function absent in .*networks_of_a_test.py"),
        ("networks_of_a_test:number", OptionError, "no function number"),
        ("networks_of_a_test:breaks", RoleError, r"raised RuntimeError: no weights here \(.*:\d+\)"),
        ("networks_of_a_test:forgets", RoleError, "the keys sample, teacher from"),
        ("networks_of_a_test:swaps", RoleError, "found sample of .*, a Tensor"),
        ("networks_of_a_test:nothing", RoleError, "found NoneType from"),
    ],
)
def test_what_cannot_be_built_is_one_line_that_says_where(module, target, error, message, capsys):
    with pytest.raises(error, match=message), built(target):
        pass
    assert cli.main(["record", target, "--path", "path"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("disback: found ")
    assert told.count("\n") == 1


def test_the_installed_command_finds_modules_of_the_working_folder(module, tmp_path):
    command = [sys.executable, "-P", "-m", "disback_plugin.cli", "record", f"{module}:alone", "--path", "path"]
    command += ["--iterations", "2", "--every", "1"]
    if sys.version_info < (3, 11):
        command.remove("-P")
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "complete" in out.stdout
    assert out.stderr == "", "no progress bar off a terminal"
