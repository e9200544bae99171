"""The floors of the house: a file imports only from files before it in the list of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "disback_plugin"

LIST = re.search(
    r"```\n(floor 0 .*?)^adapters/", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL | re.MULTILINE
)[1]
FLOORS = [
    [entry.replace("/", ".") for entry in re.findall(r"^ *(?:\d  )?([\w/]+?)(?:/|\.py) ", floor, flags=re.MULTILINE)]
    for floor in LIST.split("floor ")[1:]
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
            yield from (listed(f"{node.module}.{alias.name}".partition(".")[2]) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (listed(a.name.partition(".")[2]) for a in node.names if a.name.startswith("disback_plugin."))


def listed(name):
    """The entry of the list that an imported name is, or is in."""
    parts = name.split(".")
    found = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((entry for entry in found if entry in ORDER), name)


def files_of(module):
    file = PACKAGE / f"{module.replace('.', '/')}.py"
    return [file] if file.exists() else sorted((PACKAGE / module).glob("*.py"))


def test_the_list_names_every_file():
    every = {str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".") for path in PACKAGE.rglob("*.py")}
    assert {listed(name) for name in every if not name.endswith("__init__")} == set(ORDER)


def test_a_room_stands_on_one_floor():
    rooms = [{entry.partition(".")[0] for entry in floor if "." in entry} for floor in FLOORS]
    assert sum(map(len, rooms)) == len(set().union(*rooms))


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_only_from_below(module):
    below = set(ORDER[: ORDER.index(module)])
    for file in files_of(module):
        above = set(imports(file)) - below - {module}
        assert not above, f"{file.name} imports {sorted(above)}"


def test_the_floors_test_can_fail(tmp_path):
    lines = ["from disback_plugin.cli import main", "from disback_plugin import losses", "import disback_plugin.plan"]
    (tmp_path / "bad.py").write_text("\n".join(lines))
    assert set(imports(tmp_path / "bad.py")) == {"cli", "losses", "plan"}
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
