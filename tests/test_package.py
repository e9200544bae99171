"""What a user installs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEACHERS = ROOT / "disback_plugin" / "demo" / "teachers"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names inside a wheel built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".git", "*.egg-info", "build", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    info = next(top for top in tops if top.endswith(".dist-info"))
    assert tops == {"disback_plugin", "disback_adapters", info}


def test_the_wheel_holds_every_source_file_the_templates_the_recipes_and_the_teachers(wheel):
    for package, folder in (("disback_plugin", "disback_plugin"), ("disback_adapters", "adapters")):
        wanted = {
            f"{package}/{file.relative_to(ROOT / folder)}"
            for file in (ROOT / folder).rglob("*")
            if file.suffix in {".css", ".j2", ".py", ".safetensors", ".toml"} or file.name in {"card.md", "py.typed"}
        }
        found = {name for name in wheel.namelist() if name.startswith(f"{package}/")}
        assert found == wanted


def test_the_teachers_are_at_most_2_megabytes():
    assert 0 < sum(file.stat().st_size for file in TEACHERS.iterdir()) <= 2_000_000


def test_the_metadata_names_the_licence_the_extras_and_the_script(wheel):
    info = next(name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert set(re.findall(r"Provides-Extra: (\w+)", metadata)) == {"all", "demo", "fid", "lora", "plots", "test"}
    assert "disback = disback_plugin.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_the_top_level_holds_what_was_agreed_and_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {name.partition("/")[0] for name in tracked.splitlines()}
    assert tops <= {
        ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "adapters", "benchmarks",
        "disback_plugin", "pyproject.toml", "tests",
    }  # fmt: skip


def test_nothing_in_the_project_is_loaded_by_pickle_or_loosely():
    banned = r"torch\.load\(|pickle|load_state_dict\(.*strict=False|np\.load\(|eval\(compile"
    for file in (*(ROOT / "disback_plugin").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")):
        text = file.read_text().replace("are pickled by position", "")
        if file.name == "distributed.py":  # the ranks of one run pickle their messages, as torch.distributed does
            text = text.replace("pickle", "")
        assert not re.search(banned, text), file.name
