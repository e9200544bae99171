"""All ranks agree, or all of them stop with one error that names the rank: never a hang."""

from __future__ import annotations

import random
import re
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import returned
from sharded_runs import Sharded, trained

import disback_plugin as disback
from disback_plugin import distributed
from disback_plugin.errors import RankError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.weights.network import ScoreNetwork


def odd_one_out(folder, how):
    """A run in which rank 1 sees something else; returns what each rank raises, and what its teacher is then."""
    run, odd = Sharded("fsdp2"), dist.get_rank() == 1
    original = [t.to_local().clone() for t in run.teacher.parameters()]
    roles = run.roles()
    options = {"path": folder + "/path", "record": 4, "every": 2, "codec": "exact", "schedule": "fixed:2"}
    if odd and how == "another path":
        options["path"] = folder + "/other"
    if odd and how == "another schedule":
        options["schedule"] = "fixed:3"
    if odd and how == "a wrong role":
        roles["fake_score"] = torch.nn.Linear(1, 1)
    start = time.monotonic()
    try:
        handle = disback.attach(**roles, **options)
        if how == "another state":
            handle.load_state_dict(handle.state_dict() | ({"version": 9} if odd else {}))
        for step in range(8):
            if odd and how == "a failed read" and step == 4:
                handle.path.source = lambda position: (_ for _ in ()).throw(OSError("the disk is gone"))
            if odd and how == "another position" and step == 4:
                handle.scheduler.progress.generator_updates += 1
            if odd and how == "no move" and step == 5:
                time.sleep(3)  # longer than the others wait
            run.step()
        raise AssertionError("nobody noticed")
    except Exception as error:
        same = all(torch.equal(t.to_local(), o) for t, o in zip(run.teacher.parameters(), original, strict=True))
        said = {"kind": type(error).__name__, "text": str(error), "same": same, "seconds": time.monotonic() - start}
        time.sleep(3 if how == "no move" else 0)
        return said


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("another path", "other'.* on rank 1"),
        ("another schedule", r"schedule='Fixed\(3.* on rank 1"),
        ("a wrong role", r"rank 1 failed \(MismatchError"),
        ("a failed read", r"rank 1 failed \(OSError: the disk is gone"),
        ("another state", r"rank 1 failed \(StateError: found a state of version 9"),
        ("another position", r"generator_updates=\d on rank 1"),
    ],
)
def test_a_rank_with_other_facts_stops_all_ranks_with_one_error_that_names_it(nursery, tmp_path, how, names):
    first, second = returned(nursery.play(odd_one_out, 2, str(tmp_path), how))
    assert first["kind"] == "RankError"
    assert re.search(names, first["text"]), first["text"]
    assert first["same"], "the teacher of rank 0 was left at a node that rank 1 did not reach"
    assert second["same"]


@pytest.mark.slow
def test_no_rank_waits_longer_than_the_timeout(nursery, tmp_path):
    first, _ = returned(nursery.play(odd_one_out, 2, str(tmp_path), "no move", timeout=1))
    assert first["seconds"] < 8


def unseen_on_one_rank(folder, form, schedule, rank):
    """A run in which one rank alone updates its generator without a step, from a step on; the end of each rank."""
    run = Sharded(form)
    original = [t.clone() for t in run.teacher.parameters()]
    start, said = time.monotonic(), ""
    with disback.attach(**run.roles(), path=folder + "/path", record=4, every=2, schedule=schedule) as handle:
        try:
            for step in range(36):
                if dist.get_rank() == rank and step == 10:
                    run.optimizer_g.step = partial(run.optimizer_g.step.__func__.__wrapped__, run.optimizer_g)
                run.step()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        same = all(torch.equal(t, o) for t, o in zip(run.teacher.parameters(), original, strict=True))
        return {"end": [handle.phase, handle.position, same], "said": said, "seconds": time.monotonic() - start}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("form", "schedule", "rank"),  # the others come to a move, or to the end of a window of the divergence monitor
    [("one", "ramp:30", 1), ("ddp", "fixed:240", 0), pytest.param("ddp", "fixed:240", 1, marks=pytest.mark.slow)],
)
def test_all_ranks_end_backtracking_if_one_does_not_see_its_updates(nursery, tmp_path, form, schedule, rank):
    for result in returned(nursery.play(unseen_on_one_rank, 2, str(tmp_path), form, schedule, rank)):
        assert (result["end"], result["said"]) == (["done", 0.0, True], "")
        assert result["seconds"] < 40  # the others would wait for 60


def never_comes(folder):
    if dist.get_rank() == 1:
        time.sleep(2)
        return None
    try:
        disback.attach(**Sharded("fsdp2").roles(), path=folder + "/path", record=4, every=2)
    except RankError as error:
        return str(error)


def test_the_error_names_a_rank_that_never_attaches(nursery, tmp_path):
    first, _ = returned(nursery.play(never_comes, 2, str(tmp_path), timeout=1))
    assert "nothing from rank 1 within the timeout" in first
    assert not (tmp_path / "path").exists()


def returns_what_cannot_be_sent():
    start = time.monotonic()
    try:
        distributed.on_main_process(lambda: lambda: None)
    except Exception as error:
        seen = [type(error).__name__, str(error), time.monotonic() - start]
        return [*seen, distributed.on_main_process(lambda: "the next exchange")]


def test_a_result_that_cannot_be_pickled_stops_all_ranks_at_once(nursery):
    first, second = returned(nursery.play(returns_what_cannot_be_sent, 2))
    assert "pickle" in first[1]
    assert second[0] == "RankError"
    assert re.search(r"rank 0 failed \(.*pickle", second[1])
    assert max(first[2], second[2]) < 30, "a rank waited until the timeout"
    assert first[3] == second[3] == "the next exchange"


def looks_alone(folder):
    """Rank 0 alone evaluates with the original teacher, as trainers do."""
    from torch import nn

    run = Sharded("ddp")
    with disback.attach(
        **run.roles(), path=folder + "/path", record=2, every=1, codec="exact", schedule="fixed:3"
    ) as h:
        for _ in range(3):
            run.step()
        position, net = h.position, ScoreNetwork(run.teacher)
        assert isinstance(run.teacher, nn.Module)
        if dist.get_rank() == 0:
            with h.original_teacher():
                at_home = net.checksum() == h.path.manifest.teacher.checksum
            assert at_home
        for _ in range(4):
            run.step()
        return [position, h.position]


def test_one_rank_alone_may_use_the_original_teacher(nursery, tmp_path):
    assert returned(nursery.play(looks_alone, 2, str(tmp_path))) == [[1.0, 0.0]] * 2


def killed(nursery, folder, kills, luck):
    """Kill one of two ranks at random moments; the other has to end by itself, and a restart to go on."""
    moments, start = set(), time.monotonic()
    (reference,) = returned(nursery.play(trained, 1, "one", str(folder / "one"), 9))
    start = time.monotonic()
    returned(nursery.play(trained, 2, "fsdp2", str(folder / "whole"), 9))
    seconds = time.monotonic() - start
    for number in range(kills):
        path = folder / f"{number}"
        who = luck.randrange(2)
        seen = nursery.play(
            trained, 2, "fsdp2", str(path), 9, timeout=10, limit=40, kill=(who, 0.1 + luck.random() * seconds)
        )
        if any("status" in result and result["status"] == -9 for result in seen):
            assert seen[who].get("status") == -9 or "seen" in seen[who]
            other = seen[1 - who]
            assert other.get("status") != -9, "the other rank hung and had to be killed"
            assert "seen" in other or other["error"] != "nothing", other
        if (path / "config.json").exists():
            left = DegradationPath(path)
            if left.manifest.teacher.sha256:
                left.verify()
            moments.add((len(left), left.complete))
        first, _ = returned(nursery.play(trained, 2, "fsdp2", str(path), 9))
        assert first["seen"][-1][:2] == ["done", 0.0]
        assert len(DegradationPath(path)) == 3
    assert reference["seen"][-1][:2] == ["done", 0.0]
    return moments


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_a_restart_goes_on(nursery, tmp_path):
    killed(nursery, tmp_path, 3, random.Random(0))


@pytest.mark.slow
def test_fifty_killed_ranks_end_the_others_and_restarts_go_on(nursery, tmp_path):
    assert len(killed(nursery, tmp_path, 50, random.Random(1))) >= 3
