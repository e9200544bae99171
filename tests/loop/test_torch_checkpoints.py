"""Checkpoints by torch.distributed.checkpoint, whose dummy step fills an optimizer that has not stepped yet."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import returned
from sharded_runs import Sharded
from torch.distributed.checkpoint import state_dict as of
from worlds import Run, difference

import disback_plugin as disback
from disback_plugin.schedules import Ramp

PLAN = {"record": 4, "every": 2, "schedule": Ramp(4)}


def parts(run):
    """What a trainer hands to torch: reading the state of an optimizer without any takes a step of it."""
    pairs = {"g": (run.generator, run.optimizer_g), "f": (run.fake_score, run.optimizer_f)}
    return {f"net_{key}": of.get_model_state_dict(net) for key, (net, _) in pairs.items()} | {
        f"optim_{key}": of.get_optimizer_state_dict(*pair) for key, pair in pairs.items()
    }


def save(run, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a process group that is not there
        dcp.save(parts(run), checkpoint_id=folder)
    return run.stream.get_state()


def load(run, folder, stream):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = parts(run)
        dcp.load(state, checkpoint_id=folder)
        for net, optimizer, key in ((run.generator, run.optimizer_g, "g"), (run.fake_score, run.optimizer_f, "f")):
            of.set_model_state_dict(net, state[f"net_{key}"])
            of.set_optimizer_state_dict(net, optimizer, state[f"optim_{key}"])
    run.stream.set_state(stream)


def split(folder, moment, order, make=Run):
    """Return where a run differs that is saved, killed and resumed from one that is only saved."""
    whole, first, second = make(), make(), make()
    with disback.attach(**whole.roles(), path=folder / "whole", **PLAN):
        whole.steps(moment)
        save(whole, folder / "whole.dcp")
        whole.steps(9 - moment)
        expected = whole.checkpoint()
    handle = disback.attach(**first.roles(), path=folder / "split", **PLAN)
    first.steps(moment)
    counts = handle.fake_score_updates, handle.generator_updates
    stream, state = save(first, folder / "split.dcp"), handle.state_dict()
    assert (handle.fake_score_updates, handle.generator_updates) == counts
    handle.path.lock.release()  # as the end of its process does
    if order == "attach, load":
        handle = disback.attach(**second.roles(), path=folder / "split", **PLAN)
        load(second, folder / "split.dcp", stream)
        handle.load_state_dict(state)
    else:
        load(second, folder / "split.dcp", stream)
        disback.attach(**second.roles(), path=folder / "split", **PLAN, state=state)
    second.steps(9 - moment)
    return difference(second.checkpoint(), expected)


@pytest.mark.parametrize("order", ["attach, load", "load, attach"])
@pytest.mark.parametrize("moment", [0, 2, 4, 6])
def test_a_run_resumes_bit_for_bit_from_torchs_distributed_checkpoint(tmp_path, moment, order):
    assert split(tmp_path, moment, order) == []


def test_a_checkpoint_of_the_recording_holds_what_the_plain_trainers_does(tmp_path):
    plain, run = Run(), Run()
    expected = of.get_optimizer_state_dict(plain.generator, plain.optimizer_g)
    with disback.attach(**run.roles(), path=tmp_path, **PLAN):
        run.steps(2)
        found = of.get_optimizer_state_dict(run.generator, run.optimizer_g)
    assert difference(found, expected) == []
    assert {entry["step"].item() for entry in found["state"].values()} == {1.0}
    assert run.optimizer_g.param_groups[0]["lr"] == 1e-2


def test_a_scheduler_is_not_restored_to_the_dummy_steps_rate(tmp_path):
    run = Run()
    warmup = torch.optim.lr_scheduler.LambdaLR(run.optimizer_g, lambda step: (step + 1) / 10)
    with disback.attach(**run.roles(), path=tmp_path, **PLAN):
        of.get_optimizer_state_dict(run.generator, run.optimizer_g)  # before the first real step
        for _ in range(5):
            run.step()
            warmup.step()
    assert run.optimizer_g.param_groups[0]["lr"] == pytest.approx(2e-3)


def sharded(folder, moment, order):
    return split(Path(folder), moment, order, lambda: Sharded("fsdp2"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", [2, 6])
@pytest.mark.parametrize("order", ["attach, load", "load, attach"])
def test_two_sharded_ranks_resume_from_torchs_distributed_checkpoint(nursery, tmp_path, moment, order):
    assert returned(nursery.play(sharded, 2, str(tmp_path), moment, order)) == [[], []]
