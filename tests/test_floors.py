"""The floors of the house: a file imports only from files before it in this list; adapters import public names only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "disback_plugin"

FLOORS = [
    ["errors", "noise", "scores"],
    [
        *("formulas", "batches", "denoising", "companions", "losses", "artefacts", "kernels", "rounds"),
        *("fingerprints", "flattening", "layouts", "sharding", "states", "ranks"),
        *("modules", "pipelines", "adapting", "lora", "matching", "writing", "weights"),
        *("optimizers", "riding", "rewinding", "roles"),
        *("hookspecs", "plugins", "shelf", "hooks", "watching", "prepared", "masking", "trackers"),
    ],
    [
        *("files", "packing", "codecs", "nodes", "probes", "encoding", "manifest", "cards", "storage", "trajectory"),
        *(
            "training",
            "fitting",
            "opening",
            "recording",
            "recipes",
            "schedules",
            "plan",
            "prefetch",
            "teacher",
            "scheduler",
        ),
        *("features", "inspection", "target_field", "extractors", "metrics"),
    ],
    ["overview", "stages", "handle", "attachment", "checkpoints", "injection", "launch", "demo", "cli", "testing"],
]
ORDER = [module for floor in FLOORS for module in floor]


def imports(file):
    """Modules of this package that a file imports, wherever in the file, type checking aside."""
    tree = ast.parse(file.read_text())
    checked = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    aside = {inner for node in checked for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in aside:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("disback_plugin"):
            inner = node.module.partition(".")[2].partition(".")[0]
            yield from [inner] if inner else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("disback_plugin."))


def files_of(module):
    file = PACKAGE / f"{module}.py"
    return [file] if file.exists() else sorted((PACKAGE / module).glob("*.py"))


def test_the_list_names_every_file():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_only_from_below(module):
    below = set(ORDER[: ORDER.index(module)])
    for file in files_of(module):
        above = set(imports(file)) - below - {module}
        assert not above, f"{file.name} imports {sorted(above)}"


def test_the_floors_test_can_fail(tmp_path):
    (tmp_path / "bad.py").write_text("from disback_plugin.cli import main\nfrom disback_plugin import losses\n")
    assert set(imports(tmp_path / "bad.py")) == {"cli", "losses"}
    (tmp_path / "typed.py").write_text("if TYPE_CHECKING:\n    from disback_plugin.cli import main\nimport json\n")
    assert set(imports(tmp_path / "typed.py")) == set()


HEAVY = {"torch", "diffusers", "accelerate", "timm", "matplotlib", "sklearn", "huggingface_hub", "tqdm", "numpy"}


def imported_by(code):
    script = f"import sys; {code}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return HEAVY & set(out.split())


def test_importing_the_package_imports_nothing_heavy():
    assert imported_by("import disback_plugin; dir(disback_plugin)") == set()


def test_listing_and_calling_plug_ins_imports_nothing_heavy():
    assert imported_by("from disback_plugin.hooks import Plugins; Plugins(autoload=False).log({}, 0)") == set()


def test_attaching_imports_neither_diffusers_nor_accelerate_nor_timm_nor_matplotlib():
    assert imported_by("import disback_plugin; disback_plugin.attach") <= {"torch", "huggingface_hub", "tqdm", "numpy"}


def test_the_help_imports_nothing_heavy():
    assert imported_by("from disback_plugin.cli import parser; parser().format_help()") == set()


def test_every_public_name_is_there():
    import disback_plugin

    for name in disback_plugin.__all__:
        assert getattr(disback_plugin, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        disback_plugin.atach  # noqa: B018
