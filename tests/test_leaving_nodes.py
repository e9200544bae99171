"""A plug-in keeps the teacher on a node or lets it leave, on all ranks at once, and the rest of the plan follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from sites import install
from worlds import Run, difference

import disback_plugin as disback
from disback_plugin import hookimpl
from disback_plugin.schedules import Fixed, Ramp


class Rule:
    """Answers by the update, as a rule would."""

    def __init__(self, **answers):
        self.answers = {int(update.removeprefix("at_")): answer for update, answer in answers.items()}
        self.asked = []

    @hookimpl
    def disback_should_advance(self, scheduler, position, updates_in_node, signal):
        self.asked.append((scheduler.generator_updates, position, updates_in_node, signal))
        return self.answers.get(scheduler.generator_updates)


def visited(run, handle, steps):
    positions = []
    for _ in range(steps):
        positions.append(int(handle.position))
        run.step()
    return positions


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({}, [2, 2, 1, 1, 1, 0, 0, 0, 0]),
        ({"at_1": True}, [2, 1, 1, 1, 0, 0, 0, 0, 0]),
        ({"at_2": False}, [2, 2, 2, 1, 1, 1, 0, 0, 0]),
        ({"at_2": False, "at_3": False, "at_4": True}, [2, 2, 2, 2, 1, 1, 1, 0, 0]),
        ({"at_1": False}, [2, 2, 1, 1, 1, 0, 0, 0, 0]),  # it would have stayed anyway
        ({"at_1": True, "at_2": True}, [2, 1, 0, 0, 0, 0, 0, 0, 0]),
        ({f"at_{i}": False for i in range(1, 9)}, [2] * 9),
    ],
)
def test_a_plug_in_keeps_or_ends_a_node_and_the_rest_of_the_plan_follows(tmp_path, answers, expected):
    run, rule = Run(), Rule(**answers)
    with disback.attach(
        **run.roles(), path=tmp_path, record=6, every=2, schedule=Fixed(2, 3), plugins=(rule,)
    ) as handle:
        run.steps(6)
        assert visited(run, handle, 9) == expected
        for update, position, in_node, _ in rule.asked:
            assert position == expected[update - 1] >= 1
            assert in_node == expected[:update].count(position)
        assert handle.phase == ("done" if expected[-1] == 0 else "backtracking")


def test_the_loops_signal_reaches_the_plug_in(tmp_path):
    run, rule = Run(), Rule()
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Fixed(3), plugins=(rule,)) as handle:
        run.steps(3)
        handle.signal = 0.5
        run.step()
    assert [asked[3] for asked in rule.asked] == [None, 0.5]


@pytest.mark.parametrize("schedule", [Ramp(4), "warm"])
def test_no_plug_in_is_asked_while_the_teacher_is_on_no_node(tmp_path, schedule):
    run, rule = Run(), Rule(at_1=False, at_2=True)
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule=schedule, plugins=(rule,)):
        run.steps(9)
    assert rule.asked == []


def test_an_evaluation_does_not_change_what_a_plug_in_is_asked(tmp_path):
    seen = []
    for evaluate in (False, True):
        run, rule = Run(), Rule(at_2=False)
        options = {"record": 4, "every": 2, "schedule": Fixed(2), "plugins": (rule,)}
        with disback.attach(**run.roles(), path=tmp_path / str(evaluate), **options) as handle:
            run.steps(5)
            if evaluate:
                with handle.original_teacher():
                    run.step()
                with handle.original_teacher():
                    pass
            run.steps(4 - evaluate)
            seen.append(rule.asked)
    assert seen[0] == seen[1] == [(1, 1.0, 1, None), (2, 1.0, 2, None), (3, 1.0, 3, None)]


@pytest.mark.parametrize("moment", range(7, 15, 2))
def test_a_run_that_a_plug_in_overruled_resumes_bit_for_bit(tmp_path, moment):
    answers = {"at_1": True, "at_4": False, "at_5": False}

    def options(folder):
        rule = Rule(**answers)
        return {"path": tmp_path / folder, "record": 6, "every": 2, "schedule": Fixed(2, 3), "plugins": (rule,)}

    whole = Run()
    with disback.attach(**whole.roles(), **options("whole")) as handle:
        whole.steps(15)
        expected, end = whole.checkpoint(), handle.state_dict()
    first = Run()
    handle = disback.attach(**first.roles(), **options("split"))
    first.steps(moment)
    saved, state = first.checkpoint(), handle.state_dict()
    late = Run()
    with disback.attach(**late.roles(), **options("split")) as resumed:
        late.load(saved)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        late.steps(15 - moment)
        assert difference(late.checkpoint(), expected) == []
        assert resumed.state_dict() | {"path": "", "nodes": ""} == end | {"path": "", "nodes": ""}


RANK = """
import json, sys
import torch.distributed as dist
from disback_plugin.errors import PluginError
from disback_plugin.plugins.manager import PluginManager

dist.init_process_group("gloo")
rank = dist.get_rank()
if rank == 0:  # without such a plug-in nothing is exchanged: the other rank is not there
    assert PluginManager("no:theirs").should_advance(position=1.0, updates_in_node=1) is None
plugins, answers = PluginManager(), []
for updates in (1, 2, 3):
    answers.append(plugins.should_advance(position=1.0, updates_in_node=updates))
answers.append([plugin.reason for plugin in plugins.list_plugins() if plugin.name == "theirs"])
try:
    PluginManager("theirs").should_advance(position=1.0, updates_in_node=2)
except PluginError as error:
    answers.append(str(error))
open(f"{sys.argv[1]}/rank{rank}.json", "w").write(json.dumps(answers))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_leave_a_node_together_and_drop_a_plug_in_together_if_it_fails_on_one(site, tmp_path):
    rule = """
        import os
        @hookimpl
        def disback_should_advance(updates_in_node):
            if updates_in_node == 2 and os.environ["RANK"] == "1":
                raise ValueError("oops")
            return os.environ["RANK"] == "0"  # the ranks do not even agree
    """
    install(site, "theirs", textwrap.dedent(rule))
    (tmp_path / "rank.py").write_text(RANK)
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(site)}
    out = subprocess.run(
        [*launch, tmp_path / "rank.py", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first[:3] == second[:3] == [True, True, None]
    assert first[3] == ["RuntimeError in disback_should_advance: on rank 1, ValueError: oops"]
    assert second[3] == ["ValueError in disback_should_advance: oops"]
    assert all("theirs of disback-theirs 1.0 broke" in asked and "oops" in asked for asked in (first[4], second[4]))
