"""What people see of a path and of a walk: short tables, in a terminal and in a notebook."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from worlds import Run

import disback_plugin as disback
from disback_plugin.errors import PathError
from disback_plugin.path.model_card import ROWS


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A path of two nodes, and one of many, in a folder whose name is no HTML."""
    made = []
    for name, iterations in (("short", 2), ("a <b> & long", ROWS + 8)):
        run = Run()
        folder = tmp_path_factory.mktemp("paths") / name
        made.append(
            disback.record(run.teacher, run.fake_score, run.fake_step, path=folder, iterations=iterations, every=1)
        )
    return made


def test_a_path_is_a_short_table_of_its_nodes(paths):
    first, head, *rows = repr(paths[0]).splitlines()
    assert first == f"DegradationPath({str(paths[0].folder)!r}, nodes 0 to 2, complete)"
    assert head.split() == ["node", "iteration", "codec", "bytes", "step", "error", "in", "weights"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert f"{paths[0].nodes[1].bytes:,}" in rows[2]
    long = repr(paths[1]).splitlines()
    assert len(long) == 2 + 1 + ROWS + 1
    assert "8 more" in long[3 + ROWS // 2]
    assert long[-1].split()[0] == str(ROWS + 8)


def test_a_notebook_shows_the_same_as_html(paths):
    page = ElementTree.fromstring(f"<div>{paths[1]._repr_html_()}</div>")
    assert page.find("p").text == str(paths[1])
    shown = [[cell.text or "" for cell in row] for row in page.iter("tr")]
    assert [" ".join(row).split() for row in shown] == [line.split() for line in repr(paths[1]).splitlines()[1:]]


def test_a_scheduler_shows_where_it_stands(paths):
    run = Run()
    scheduler = disback.TrajectoryScheduler(paths[0], run.teacher, run.fake_score, schedule="fixed:3")
    assert repr(scheduler).startswith("<TrajectoryScheduler not started: position 0 (N = 2, ")
    scheduler.start()
    scheduler.step()
    assert repr(scheduler).startswith("<TrajectoryScheduler backtracking: position 1 ")
    assert repr(scheduler).endswith("Fixed(3), 1 generator updates>")
    plain = disback.TrajectoryScheduler(None, run.teacher)
    assert "no path" in repr(plain)


def test_an_error_that_names_a_path_stays_one_line(tmp_path):
    from disback_plugin.path.manifest import Recording

    run = Run()
    path = disback.DegradationPath.create(tmp_path / "p", run.teacher.state_dict(), Recording(4, 2))
    with pytest.raises(PathError, match="an unfinished path") as caught:
        disback.TrajectoryScheduler(path, run.teacher)
    assert "\n" not in str(caught.value)
