"""What the pages say: every block of code runs, every command is one, and every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "adapters", "adapters/lcm_lora", "benchmarks", "disback_plugin", "disback_plugin/*")
PAGES = {
    str(page.relative_to(ROOT)): page.read_text()
    for folder in FOLDERS
    for page in sorted(ROOT.glob(f"{folder}/*.md"))
    if page.name != "card.md"  # a template
}
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page, text in PAGES.items()
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
]


def test_the_guides_are_found_and_the_front_page_is_short():
    guides = {"adapters", "adapters/lcm_lora", "benchmarks", "disback_plugin"}
    guides |= {f"disback_plugin/{package}" for package in ("path", "plugins", "weights")}
    assert {f"{guide}/README.md" for guide in guides} <= PAGES.keys()
    assert len(PAGES["README.md"].splitlines()) <= 220
    assert len(PAGES["CONTRIBUTING.md"].splitlines()) <= 150


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_of_the_pages_runs(block, tmp_path, monkeypatch):
    from worlds import Run, Score

    import disback_plugin

    monkeypatch.chdir(tmp_path)
    run = Run()
    names = {
        "generator": run.generator,
        "teacher": run.teacher,
        "fake_score": run.fake_score,
        "generator_optimizer": run.optimizer_g,
        "fake_score_optimizer": run.optimizer_f,
        "fake_step": run.fake_step,
        "train": lambda: run.steps(210),
        "compute_generator_loss": run.generator_loss,
        "guidance_model": _root(run, Score),
    }
    if 'from_pretrained("runs/path")' in block:
        disback_plugin.record(run.teacher, run.fake_score, run.fake_step, path="runs/path", iterations=2, every=1)
    exec(compile(block, "page", "exec"), names)


def _root(run, score):
    from torch import nn

    root = nn.Module()
    root.real_unet, root.fake_unet = run.teacher, run.fake_score
    return root


def test_the_readme_names_the_two_commands_that_are_tested():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "pip install -e '.[demo]' && disback demo" in readme
    assert "pip install -e '.[test]' && pytest" in readme
    assert "pip install -e '.[test]' && pytest" in script


LINKS = [
    (page, target)
    for page, text in PAGES.items()
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_every_link_of_the_pages_leads_somewhere(page, target):
    """Within the project; an address elsewhere is only looked at for its form."""
    if target.startswith("http"):
        assert re.fullmatch(r"https://[\w.-]+\.\w+(/[^\s]*)?", target)
        return
    file, _, anchor = target.partition("#")
    found = (ROOT / page).parent / file if file else ROOT / page
    assert found.exists(), f"{page} links to {target}"
    tracked = ["git", "ls-files", "--error-unmatch", str(found)]
    assert subprocess.run(tracked, cwd=ROOT, capture_output=True, check=False).returncode == 0, (
        f"{target} is not tracked"
    )
    if anchor:
        assert anchor in _anchors(found.read_text()), f"{page} links to {target}"


def _anchors(text):
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_an_anchor_is_what_github_makes_of_a_heading():
    assert _anchors("# Does it help?\n\n## The `path` of s'_0\n```\n# no heading\n```") == {
        "does-it-help",
        "the-path-of-s_0",
    }


COMMANDS = [
    (page, command.strip())
    for page, text in PAGES.items()
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.partition(" #")[0].split("&&")
    if command.strip()
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_of_the_pages_is_one(page, command):
    """What begins with "disback" parses; others run a program, module or file that exists."""
    program, *arguments = shlex.split(command)
    assert program in {"accelerate", "bash", "disback", "pip", "pytest", "python", "torchrun"}, command
    if program == "disback":
        _parses(arguments)
    elif "-m" in arguments and program in {"accelerate", "python", "torchrun"}:
        module, *rest = arguments[arguments.index("-m") + 1 :]
        assert find_spec(module), command
        if module == "disback_plugin.launch":
            _parses(["run", *rest])
    elif program in {"bash", "python", "pytest"}:
        for argument in arguments:
            assert "/" not in argument or argument.startswith("-") or (ROOT / argument).exists(), command


def _parses(arguments):
    from disback_plugin.cli import parser

    try:
        parser().parse_args(arguments)
    except SystemExit as error:
        pytest.fail(f"disback {shlex.join(arguments)} ends with {error.code}")
