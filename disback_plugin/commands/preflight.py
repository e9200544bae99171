"""`disback preflight`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from disback_plugin.commands import Commands, command, json_option

if TYPE_CHECKING:
    from disback_plugin.outlook import Outlook

__all__ = ["add"]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback preflight` to the commands."""
    preflight = command(
        commands,
        "preflight",
        help="say what DisBack costs on your networks, and what it may bring",
        description="Records until the fake score is fitted, on networks that a function of yours builds, and says how "
        "long that takes, what a node costs in bytes and time, what schedule=auto would do, and what the evidence "
        "supports expecting. Nothing of it is kept.",
        examples="""
        disback preflight networks:build
        disback preflight networks:build --json | jq .excess_loss

        with networks.py as for disback record; if fake_step() returns its loss, the excess loss is known
        """,
    )
    preflight.add_argument("build", metavar="MODULE:FUNCTION", help="returns the networks; as in pkg.module:build")
    preflight.add_argument(
        "--iterations", type=int, default=200, metavar="N", help="the most updates it may take (%(default)s)"
    )
    preflight.add_argument("--codec", default="int8", metavar="C", help="how the node is stored (%(default)s)")
    preflight.add_argument(
        "--learning-rate", type=float, metavar="R", help="of Adam, in a recording with sample and loss (1e-5)"
    )
    json_option(preflight, "lines")
    preflight.set_defaults(run=run, code_of_users=True)


def run(options: argparse.Namespace) -> None:
    """Look ahead, and print what was found."""
    import json

    from disback_plugin.entry_function import built
    from disback_plugin.outlook import preflight

    with built(options.build, learning_rate=options.learning_rate) as networks:
        found = preflight(**networks, iterations=options.iterations, codec=options.codec)
    print(json.dumps(found.as_json()) if options.json else "\n".join(_lines(found)))


def _lines(found: Outlook) -> list[str]:
    excess = "not known: fake_step() returns no loss" if found.excess_loss is None else f"{found.excess_loss:.2f}"
    fitted = f"F = {found.fitted}" if found.fitted else "not fitted: more --iterations, or another --learning-rate"
    return [
        f"teacher          {found.weights:,} weights, {found.teacher_bytes:,} bytes",
        f"excess loss      {excess}",
        f"recording        {found.recorded} updates ({fitted}), {found.update_seconds:.3g} s each: "
        f"as much compute as {found.rounds:.0f} rounds of Diff-Instruct",
        f"a node           {found.node_bytes:,} bytes, coded in {found.encode_seconds:.3g} s; "
        f"a move of the teacher takes {found.move_seconds:.3g} s",
        f"auto             walks back in {found.walk_updates} generator updates, and lets go after "
        f"{found.whole_updates}",
        "",
        found.advice,
    ]
