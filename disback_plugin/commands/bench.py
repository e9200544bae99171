"""`disback bench`: the benchmarks of a checkout."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from disback_plugin.commands import Commands, command, json_option
from disback_plugin.errors import OptionError

__all__ = ["add"]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback bench` to the commands."""
    bench = command(
        commands,
        "bench",
        help="run the benchmarks of a checkout",
        description="Run the speed comparisons of a checkout of this project, the one that the working folder is in or "
        "that is installed from: all of them, or those named. `bench convergence` runs the study of convergence "
        "instead, for hours, regime by regime into --out; what is there is not run again. Exits with 1 if a "
        "comparison misses its goal.",
        examples="""
        disback bench
        disback bench swap hooks --json > speed.json
        disback bench convergence 'mlp scratch' --out results
        """,
    )
    bench.add_argument("names", nargs="*", metavar="NAME", help="as swap for benchmarks/bench_swap.py (all)")
    bench.add_argument("--out", type=Path, metavar="DIR", help="of convergence: where teachers and results go")
    json_option(bench, "pytest's tables")
    bench.set_defaults(run=run, interrupted="regimes and comparisons that ended are kept: the same command goes on")


def run(options: argparse.Namespace) -> int:
    """Run benchmarks in a process of their own, and return its exit code."""
    root = _checkout()
    if options.names[:1] == ["convergence"]:
        if options.out is None or options.json:
            raise OptionError(
                "bench convergence " + ("--json" if options.json else "without --out"),
                expected="a folder for its results, which are JSON",
                cure="add --out results" + " and drop --json" * options.json,
            )
        script = root / "benchmarks" / "bench_convergence.py"
        return _call([str(script), *options.names[1:], "--out", str(options.out.absolute())], root)
    if options.out is not None:
        raise OptionError("--out without convergence", expected="no --out", cure="drop it: pytest saves the numbers")
    known = sorted(each.stem.removeprefix("bench_") for each in root.glob("benchmarks/bench_*.py"))
    for name in options.names:
        if name not in known:
            raise OptionError(f"no benchmark {name!r}", expected=f"some of {', '.join(known)}", cure="name one of them")
    files = [str(root / "benchmarks" / f"bench_{name}.py") for name in options.names] or [str(root / "benchmarks")]
    arguments = ["-m", "pytest", "--benchmark", *files]
    if not options.json:
        return _call(arguments, root)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmarks.json"
        code = _call([*arguments, f"--benchmark-json={file}"], root, quiet=True)
        print(json.dumps(json.loads(file.read_text()) if file.exists() and file.stat().st_size else {}))
    return code


def _checkout() -> Path:
    """Return the root of the checkout around the working folder, or of the one that is installed from."""
    here = Path.cwd()
    for root in (here, *here.parents, Path(__file__).parents[2]):
        if (root / "benchmarks" / "bench_convergence.py").is_file() and (root / "pyproject.toml").is_file():
            return root
    raise OptionError(
        f"no benchmarks around {here}",
        expected="a checkout of disback-plugin: they are no part of what is installed",
        cure="go into one, pip install -e '.[test]' there, and run disback bench again",
    )


def _call(arguments: list[str], root: Path, *, quiet: bool = False) -> int:
    """Run Python in the checkout; `quiet` keeps standard output for JSON. Return 0, 1 failed, or 2 wrong use."""
    code = subprocess.run([sys.executable, *arguments], cwd=root, stdout=sys.stderr if quiet else None, check=False)
    return min(abs(code.returncode), 2)
