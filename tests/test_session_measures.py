"""`attach(..., evaluate=fn)`: when the user's function is called, what it sees, and that a run does not notice."""

from __future__ import annotations

import json
import logging
import random

import numpy
import pytest
import torch
import torch.distributed as dist
from ranks import returned
from sharded_runs import Sharded
from worlds import Run, clone, difference, everything

import disback_plugin as disback
from disback_plugin.errors import OptionError
from disback_plugin.plugins.log_reader import read

PLAN = {"record": 4, "every": 2, "codec": "exact", "schedule": "fixed:7"}


class Evaluation:
    """A function that measures, draws from every global generator, and remembers what it saw."""

    def __init__(self, run):
        self.run, self.handle, self.seen = run, None, []
        self.original = clone(dict(run.teacher.state_dict()))

    def __call__(self):
        torch.rand(3), random.random(), numpy.random.random()
        assert difference(dict(self.run.teacher.state_dict()), self.original) == [], "the original teacher"
        assert not torch.is_grad_enabled()
        assert self.handle.phase != "recording"
        update = self.handle.generator_updates
        self.seen.append(update)
        distance = self.run.generator(torch.ones(4, 2)).square().mean()
        return {"distance": distance, "twice": 2 * distance.item()}


def attached(run, evaluate=None, **options):
    handle = disback.attach(**run.roles(), evaluate=evaluate, **options)
    if isinstance(evaluate, Evaluation):
        evaluate.handle = handle
    return handle


def states():
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()


@pytest.mark.parametrize(
    "plan", [PLAN, PLAN | {"schedule": "auto", "record": 12}, {"record": 0}], ids=["fixed", "auto", "none"]
)
def test_a_run_does_not_notice_that_it_is_evaluated_bit_for_bit(tmp_path, plan):
    found = []
    for name in ("with", "without"):
        run = Run()
        torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
        evaluate = Evaluation(run) if name == "with" else None
        paths = {"path": tmp_path / name} if plan["record"] else {}
        with attached(run, evaluate, evaluate_every=3, **plan, **paths) as handle:
            for _ in range(40):
                run.step()
                random.random(), torch.rand(1), numpy.random.random()
            found.append((everything(run), handle.state_dict() | {"path": ""}, states()))
    assert len(evaluate.seen if evaluate else found) == 2
    (one, other), (first, second) = zip(*(each[:2] for each in found), strict=True), (each[2] for each in found)
    assert difference(*one) == []
    assert difference(*other) == []
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:]


def test_the_initial_student_then_every_so_many_updates_are_evaluated_and_none_while_recording(tmp_path, caplog):
    run = Run()
    evaluate = Evaluation(run)
    with (
        caplog.at_level(logging.INFO),
        attached(run, evaluate, evaluate_every=3, path=tmp_path / "p", **PLAN) as handle,
    ):
        run.steps(4)
        assert evaluate.seen == []
        run.steps(10)
        assert (evaluate.seen, handle.generator_updates) == ([0, 3, 6, 9], 10)
        assert handle.phase == "done"
    curves = read(tmp_path / "p.log.jsonl").curves()
    assert [update for update, _ in curves["distance"]] == [0, 3, 6, 9]
    assert [value for _, value in curves["twice"]] == pytest.approx([2 * value for _, value in curves["distance"]])
    assert any("update 3: distance " in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("order", ["load_state_dict", "state="])
@pytest.mark.parametrize("moment", [2, 4, 5, 6, 7, 8, 12])
def test_a_resumed_run_neither_repeats_nor_skips_an_evaluation(tmp_path, moment, order):
    whole, first, second = Run(), Run(), Run()
    with attached(whole, Evaluation(whole), evaluate_every=2, path=tmp_path / "whole", **PLAN):
        whole.steps(14)
    evaluations = [Evaluation(run) for run in (first, second)]
    handle = attached(first, evaluations[0], evaluate_every=2, path=tmp_path / "p", **PLAN)
    first.steps(moment)
    saved, state = first.checkpoint(), handle.state_dict()
    handle.path.lock.release()  # as the end of its process does
    if order == "state=":
        second.load(saved)
        resumed = attached(second, evaluations[1], evaluate_every=2, path=tmp_path / "p", state=state, **PLAN)
    else:
        resumed = attached(second, evaluations[1], evaluate_every=2, path=tmp_path / "p", **PLAN)
        second.load(saved)
        resumed.load_state_dict(state)
    with resumed:
        second.steps(14 - moment)
    assert evaluations[0].seen + evaluations[1].seen == [0, 2, 4, 6, 8, 10]
    expected, found = (read(tmp_path / f"{name}.log.jsonl").curves()["distance"] for name in ("whole", "p"))
    assert found == expected


def test_the_agreement_of_the_fake_scores_gradients_is_logged_once_a_window(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", record=4, every=4, schedule="ramp:40"):
        run.steps(40)
    lines = map(json.loads, (tmp_path / "path.log.jsonl").read_text().splitlines())
    updates = [line["update"] for line in lines if "agreement" in json.dumps(line) and line["update"]]
    assert updates == [5, 10, 15, 20, 25, 30, 35]


def test_what_the_function_raises_ends_the_run_and_names_the_update_with_the_node_in_place_again(tmp_path):
    run, calls = Run(), []

    def evaluate():
        calls.append(handle.generator_updates)
        if calls[-1] == 3:
            raise KeyError("no such image")
        return {}

    handle = attached(run, evaluate, evaluate_every=3, path=tmp_path / "p", **PLAN)
    with handle:
        run.steps(4 + 2)
        node, before = clone(dict(run.teacher.state_dict())), states()
        with pytest.raises(KeyError, match="no such image") as raised:
            run.step()
        assert any(
            "at generator update 3" in note for note in getattr(raised.value, "__notes__", ["at generator update 3"])
        )
        assert (handle.position, handle.generator_updates) == (1.0, 3)
        assert difference(dict(run.teacher.state_dict()), node) == []
        assert torch.equal(states()[0], before[0])
        run.steps(9)
    assert calls == [0, 3, 6, 9, 12]


@pytest.mark.parametrize(
    "wrong",
    [{"evaluate": 3}, {"evaluate": dict, "evaluate_every": 0}, {"evaluate": dict, "evaluate_every": 2.5}],
    ids=str,
)
def test_what_is_no_function_or_no_interval_is_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(OptionError, match="evaluate_every="):
        disback.attach(**Run().roles(), path=tmp_path / "p", **PLAN, **wrong)
    assert not (tmp_path / "p").exists()


def test_an_answer_that_is_no_mapping_of_numbers_is_refused_by_name(tmp_path):
    for answer, names in ((3.0, "returned a float"), ({"distance": "far"}, "distance='far'")):
        run = Run()
        handle = disback.attach(**run.roles(), record=0, evaluate=lambda answer=answer: answer, evaluate_every=1)
        with handle, pytest.raises(OptionError, match=names):
            run.steps(1)


def of_ranks(folder):
    """A sharded run of which every rank evaluates; returns the updates and the sums that this rank saw."""
    run, seen = Sharded("fsdp2"), []

    def evaluate():
        total = sum(p.full_tensor().sum() for p in run.teacher.parameters())  # needs all ranks
        seen.append((handle.generator_updates, round(total.item(), 5)))
        return {"distance": float(dist.get_rank()), "total": total}

    options = {"record": 4, "every": 2, "codec": "exact", "schedule": "fixed:5", "path": folder + "/p"}
    with disback.attach(**run.roles(), evaluate=evaluate, evaluate_every=2, **options) as handle:
        for _ in range(4 + 7):
            run.step()
    return {"seen": seen}


@pytest.mark.slow
def test_every_rank_of_a_sharded_run_evaluates_with_the_original_teacher_and_rank_0_logs(nursery, tmp_path):
    first, second = returned(nursery.play(of_ranks, 2, str(tmp_path)))
    assert first == second
    assert [update for update, _ in first["seen"]] == [0, 2, 4, 6]
    assert len({total for _, total in first["seen"]}) == 1
    assert read(tmp_path / "p.log.jsonl").curves()["distance"] == [(update, 0.0) for update in (0, 2, 4, 6)]
