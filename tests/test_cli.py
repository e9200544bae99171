"""The frame of all commands: help, options, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points, version

import pytest

from disback_plugin import DegradationPath, cli
from disback_plugin.cli import COMMANDS
from disback_plugin.errors import DisbackError


def disback(*arguments, **options):
    command = [sys.executable, "-m", "disback_plugin.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_with_an_example(name, capsys, monkeypatch):
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit) as caught:
            cli.main([name, "--help"])
        assert caught.value.code == 0
        explained = capsys.readouterr().out
        options, _, example = explained.partition("\nExample:\n")
        assert f"disback {name}" in example
        assert "--debug" in options
        assert "\x1b" not in explained


def test_the_help_comes_in_a_fifth_of_a_second():
    seconds = []
    for _ in range(5):
        before = os.times()
        assert disback("--help").returncode == 0
        after = os.times()  # of the processor: what else the machine does is not the command's
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.2


def test_help_names_the_commands_and_is_formatted_at_any_width(monkeypatch, capsys):
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            cli.main(["--help"])
        assert "plugins" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["demo", "--seeds", "x"], ["demo", "--world", "moons"], ["demo", "--seed", "3"]],
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


@pytest.mark.parametrize("arguments", [["--debug", "inspect"], ["inspect", "--debug"]])
def test_an_error_is_one_line_and_debug_raises_it(arguments, tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(DisbackError):
        cli.main([*arguments, str(tmp_path)])


def test_plug_ins_are_named_before_or_after_the_command(capsys):
    assert cli.main(["-p", "no:sid", "plugins", "-p", "no:dmd2", "--json"]) == 0
    listed = {plugin["name"]: plugin["status"] for plugin in json.loads(capsys.readouterr().out)["plugins"]}
    assert [listed[name] for name in ("sid", "dmd2", "fastgen")] == ["blocked", "blocked", "installed"]


def test_the_command_is_installed_and_knows_its_version():
    (script,) = entry_points(group="console_scripts", name="disback")
    assert script.load() is cli.main
    assert disback("--version").stdout.strip() == f"disback-plugin {version('disback-plugin')}"


NETWORKS = """
import time, torch
from torch import nn

def build():
    torch.manual_seed(0)
    teacher = nn.Linear(2, 2)
    def loss(net, x_0):
        time.sleep(0.02)
        return (net(x_0) - 1).square().mean()
    return {"teacher": teacher, "sample": lambda: torch.randn(4, 2), "loss": loss}
"""


@pytest.fixture
def _ctrl_c_reaches_children():
    """A shell's background job ignores SIGINT, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_reaches_children")
@pytest.mark.slow
def test_an_interrupted_recording_says_that_it_can_be_resumed_and_is(tmp_path, monkeypatch, capsys):
    (tmp_path / "slow_networks.py").write_text(NETWORKS)
    arguments = ["record", "slow_networks:build", "--path", "path", "--iterations", "200", "--every", "5"]
    command = [sys.executable, "-m", "disback_plugin.cli", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "path" / "node-003.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert err == "disback: interrupted; the same command goes on from the last node that is in path\n"
    recorded = len(DegradationPath(tmp_path / "path")) - 1
    assert 2 <= recorded < 40
    monkeypatch.chdir(tmp_path)
    assert cli.main([*arguments, "--json"]) == 0
    sys.modules.pop("slow_networks")
    assert json.loads(capsys.readouterr().out)["complete"]
    begins = [json.loads(line) for line in (tmp_path / "path.log.jsonl").read_text().splitlines() if '"begin"' in line]
    assert [begin["recording"] for begin in begins] == [0, 5 * recorded]


def test_a_place_that_cannot_be_written_is_one_line_and_exit_code_1(tmp_path, capsys):
    (tmp_path / "x.log.jsonl").write_text('{"update": 0, "loss": 1.0}\n')
    (tmp_path / "file").write_text("")
    arguments = ["report", str(tmp_path / "x.log.jsonl"), "--out", str(tmp_path / "file" / "report.html")]
    assert cli.main(arguments) == 1
    told = capsys.readouterr().err
    assert told.startswith("disback: ")
    assert told.count("\n") == 1
    with pytest.raises(OSError, match="file"):
        cli.main([*arguments, "--debug"])


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "disback_plugin.cli", "plugins"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
