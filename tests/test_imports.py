"""What an import brings with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "diffusers",
    "accelerate",
    "timm",
    "matplotlib",
    "sklearn",
    "huggingface_hub",
    "tqdm",
    "numpy",
    "jinja2",
}


def imported_by(code):
    script = f"import sys; {code}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return HEAVY & set(out.split())


def test_importing_the_package_imports_nothing_heavy():
    assert imported_by("import disback_plugin; dir(disback_plugin)") == set()


def test_listing_and_calling_plug_ins_imports_nothing_heavy():
    assert (
        imported_by(
            "from disback_plugin.plugins import PluginManager; "
            "PluginManager(autoload=False).call('disback_log', values={}, step=0)"
        )
        == set()
    )


def test_attaching_imports_neither_diffusers_nor_accelerate_nor_timm_nor_matplotlib():
    assert imported_by("import disback_plugin; disback_plugin.attach") <= {
        "torch",
        "huggingface_hub",
        "tqdm",
        "numpy",
        "jinja2",
    }


def test_the_help_imports_nothing_heavy():
    assert imported_by("from disback_plugin.cli import parser; parser().format_help()") == set()


def test_an_adapters_watch_and_the_panels_of_a_report_import_nothing_heavy():
    assert imported_by("import disback_plugin; disback_plugin.Watch; import disback_plugin.report.figures") == set()


def test_every_public_name_is_there():
    import disback_plugin

    for name in disback_plugin.__all__:
        assert getattr(disback_plugin, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        disback_plugin.atach  # noqa: B018
