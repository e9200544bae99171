"""The package in adapters/README.md: pip installs it, its entry points are found, and `disback run` uses it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import disback_plugin as disback

HERE = Path(__file__).parents[1]
PACKAGE, TRAINERS = HERE / "example_package", HERE / "trainers"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed a copy of the package: it builds in the folder it is given."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(PACKAGE, folder / "source")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def disback_command(site, folder, *arguments):
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{TRAINERS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "disback_plugin.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)


@pytest.mark.slow
def test_its_adapter_and_its_log_take_part_in_a_run_of_a_script_that_nobody_edits(site, tmp_path):
    plan = ("--record", 4, "--every", 2, "--codec", "exact", "--schedule", "fixed:2")
    options = ("run", "--adapter", "pairs", "--path", tmp_path / "path", *plan)
    done = disback_command(site, tmp_path, *options, TRAINERS / "pairs_train.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "disback: attached to pairs 1.2 (March 2026)" in done.stderr
    assert "disback: ended: <disback done: position 0 (N = 2" in done.stderr
    disback.DegradationPath(tmp_path / "path").verify()
    assert len((tmp_path / "path.states.jsonl").read_text().splitlines()) == 1, "the checkpoint was followed"
    log = [json.loads(line) for line in (tmp_path / "disback-log.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["disback/position"]) for entry in log if "disback/position" in entry] == [
        (0, 1.0),
        (2, 0.0),
    ]


@pytest.mark.slow
def test_its_refusal_is_one_line(site, tmp_path):
    options = ("run", "--adapter", "pairs", "--path", tmp_path / "path")
    done = disback_command(site, tmp_path, *options, TRAINERS / "pairs_train.py", tmp_path, "--shared")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("disback: found pairs with --shared")


def test_its_adapter_and_its_log_are_listed_and_ready(site, tmp_path):
    done = disback_command(site, tmp_path, "plugins", "--check", "--json")
    assert done.returncode == 0, done.stderr
    listed = {plugin["name"]: plugin for plugin in json.loads(done.stdout)["plugins"]}
    for name, hook in (("pairs", "disback_adapter"), ("pairs_log", "disback_log")):
        assert (listed[name]["distribution"], listed[name]["version"]) == ("disback-pairs", "1.0")
        assert (listed[name]["status"], listed[name]["hooks"]) == ("ready", [hook])


def test_the_guide_shows_the_files_of_this_package():
    text = (HERE.parent / "adapters" / "README.md").read_text()
    blocks = dict(re.findall(r"```(python|toml)\n(.*?)```", text, flags=re.DOTALL))
    assert blocks["python"] == (PACKAGE / "disback_pairs.py").read_text()
    assert blocks["toml"] == (PACKAGE / "pyproject.toml").read_text()
