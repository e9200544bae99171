"""`disback plugins` lists plug-ins without importing one."""

from __future__ import annotations

import json
import subprocess
import sys

from disback_plugin import cli

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
