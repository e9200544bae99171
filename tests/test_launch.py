"""`disback run` on stand-ins of the public trainers: their names and order of calls, every role where they keep it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worlds import difference

import disback_plugin as disback
from disback_plugin.weights.network import ScoreNetwork

TRAINERS = Path(__file__).parent / "trainers"
PLAN = ("--record", "6", "--every", "2", "--codec", "exact", "--schedule", "fixed:2,2")


def python(*arguments, extra=None, **options):
    """Run Python as a user would, with the trainers' folder on the path, as their README asks for."""
    environment = os.environ | {"PYTHONPATH": str(TRAINERS), "OMP_NUM_THREADS": "1"} | (extra or {})
    out = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment, **options
    )
    return out.returncode, out.stderr


def run(adapter, script, out, *options, arguments=(), module="disback_plugin.cli", command=("run",)):
    out.mkdir(exist_ok=True)
    where = "--outdir" if script.startswith(("sid", "di")) else "--output_path"
    return python(
        "-m", module, *command, "--adapter", adapter, *options, TRAINERS / script, where, out, *arguments, cwd=out
    )


def plain(script, out):
    out.mkdir(exist_ok=True)
    where = "--outdir" if script.startswith(("sid", "di")) else "--output_path"
    assert python(TRAINERS / script, where, out) == (0, "")


def networks(out, monkeypatch):
    """Teacher, fake score and generator at the end of a run."""
    monkeypatch.syspath_prepend(str(TRAINERS))
    return [ScoreNetwork(net).state_dict() for net in torch.load(out / "networks.pt", weights_only=False)]


SCRIPTS = [
    ("sid", "sid_train.py"),
    ("diff_instruct", "di_train.py"),
    ("dmd2", "train_edm.py"),
    ("dmd2", "train_sd.py"),
]


@pytest.mark.parametrize(("adapter", "script"), SCRIPTS)
def test_a_script_that_nobody_edits_goes_through_both_stages_and_ends_on_its_teacher(
    adapter, script, tmp_path, monkeypatch
):
    code, errors = run(adapter, script, tmp_path / "out", "--path", tmp_path / "path", *PLAN)
    assert code == 0, errors
    assert "disback: attached to" in errors
    assert "recorded node 3 at iteration 6" in errors
    assert "disback: ended: <disback done: position 0" in errors
    path = disback.DegradationPath(tmp_path / "path")
    path.verify()
    assert [node.iteration for node in path.nodes] == [2, 4, 6]
    teacher, _, _ = networks(tmp_path / "out", monkeypatch)
    assert difference(teacher, path[0]) == []


@pytest.mark.parametrize(("adapter", "script"), SCRIPTS)
def test_the_losses_are_the_trainers_own_bit_for_bit_without_recording(adapter, script, tmp_path, monkeypatch):
    plain(script, tmp_path / "plain")
    code, errors = run(adapter, script, tmp_path / "out", "--record", "0")
    assert code == 0, errors
    assert (tmp_path / "out" / "losses.json").read_text() == (tmp_path / "plain" / "losses.json").read_text()
    assert difference(networks(tmp_path / "out", monkeypatch), networks(tmp_path / "plain", monkeypatch)) == []


def test_the_generator_does_not_move_while_recording(tmp_path, monkeypatch):
    code, errors = run(
        "sid", "sid_train.py", tmp_path / "out", "--path", tmp_path / "path", *PLAN, arguments=("--rounds", "6")
    )
    assert code == 0, errors
    path = disback.DegradationPath(tmp_path / "path")
    _, fake_score, generator = networks(tmp_path / "out", monkeypatch)
    assert difference(generator, path[0]) == [], "SiD's generator starts as the teacher"
    assert difference(fake_score, path[3]) == []


def test_the_module_form_for_torchrun_does_the_same(tmp_path):
    options = ("--path", tmp_path / "path", *PLAN)
    code, errors = run("sid", "sid_train.py", tmp_path / "out", *options, module="disback_plugin.launch", command=())
    assert code == 0, errors
    assert "disback: ended: <disback done" in errors


def test_two_processes_under_torchrun_walk_together_and_the_first_one_speaks(tmp_path):
    code, errors = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "disback_plugin.launch"),
        *("--adapter", "dmd2", "--path", tmp_path / "path", *PLAN, TRAINERS / "train_edm.py"),
        *("--output_path", tmp_path),
        cwd=tmp_path,
        extra={"ACCELERATE_USE_CPU": "1"},
    )
    assert code == 0, errors
    assert errors.count("disback: attached to") == 1
    assert errors.count("disback: ended: <disback done: position 0 (N = 3") == 1
    disback.DegradationPath(tmp_path / "path").verify()


def test_the_official_forks_own_swap_moves_nothing_and_ours_moves_every_weight(tmp_path, monkeypatch):
    arguments = ("--step", "24000", "--start_target_num", "25000", "--interval", "1000", "--trajectory_dir", tmp_path)
    stored = tmp_path / "checkpoint_model_024900"
    stored.mkdir()
    monkeypatch.syspath_prepend(str(TRAINERS))
    from sd_trainer import SDGuidance

    names = [f"module.{name}" for name in SDGuidance(False).state_dict()]  # as degradation.py:301 saves them, DDP's
    torch.save({name: torch.full((), 7.0) for name in names}, stored / "pytorch_model_1.bin")
    code, errors = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "disback_plugin.launch"),
        *("--adapter", "dmd2", "--path", tmp_path / "path", *PLAN, TRAINERS / "fork" / "train_sd.py"),
        *("--output_path", tmp_path, *arguments),
        cwd=tmp_path,
    )
    assert code == 0, errors
    assert json.loads((tmp_path / "swaps.json").read_text()) == [[5, 0, 5, len(names)]]
    assert "disback: ended: <disback done: position 0 (N = 3" in errors
    path = disback.DegradationPath(tmp_path / "path")
    weights = {name for name in path[0] if name != "resample_filter"}
    for node in (1, 2, 3):
        assert {name for name in path[0] if not torch.equal(path[node][name], path[node - 1][name])} == weights
    teacher, _, _ = networks(tmp_path, monkeypatch)
    assert difference(teacher, path[0]) == []


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_sids_own_resume_goes_on_where_the_path_was_and_ends_alike(tmp_path, monkeypatch):
    options = ("--path", tmp_path / "path", *PLAN, "--schedule", "fixed:3,3")
    code, errors = run("sid", "sid_train.py", tmp_path / "whole", *options, arguments=("--rounds", "16", "--dump", "8"))
    assert code == 0, errors
    saved = tmp_path / "whole" / "training-state-000008.pt"
    states = [json.loads(line) for line in (tmp_path / "path.states.jsonl").read_text().splitlines()]
    assert [(state["phase"], state["generator_updates"]) for state in states] == [("backtracking", 2), ("done", 10)]
    code, errors = run(
        "sid", "sid_train.py", tmp_path / "rest", *options, arguments=("--rounds", "16", "--resume", saved)
    )
    assert code == 0, errors
    assert "position 2 (N = 3" in errors
    assert "2 generator updates" in errors
    assert difference(networks(tmp_path / "rest", monkeypatch), networks(tmp_path / "whole", monkeypatch)) == []


def test_dmd2s_checkpoint_holds_the_teacher_itself_and_not_the_active_node(tmp_path, monkeypatch):
    options = ("--path", tmp_path / "path", *PLAN, "--schedule", "fixed:9,9")
    code, errors = run("dmd2", "train_edm.py", tmp_path / "out", *options, arguments=("--save_at", "13"))
    assert code == 0, errors
    from safetensors.torch import load_file

    (checkpoint,) = (tmp_path / "out").glob("checkpoint_*")
    saved = load_file(checkpoint / "model_1.safetensors")
    path = disback.DegradationPath(tmp_path / "path")
    teacher = {name.removeprefix("real_unet."): t for name, t in saved.items() if name.startswith("real_unet.")}
    assert difference(teacher, path[0]) == []
    code, errors = run(
        "dmd2", "train_edm.py", tmp_path / "again", *options, arguments=("--checkpoint_path", checkpoint)
    )
    assert code == 0, errors
    assert "attached to tianweiy/DMD2" in errors
    assert "backtracking: position 2 (N = 3" in errors, "it went on where the checkpoint was"


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path):
    options = ("--path", tmp_path / "path", *PLAN)
    code, errors = run("dmd2", "train_edm.py", tmp_path / "out", *options, arguments=("--interrupt_at", "4"))
    assert code == 130
    assert "stopped while recording, after 0 generator updates" in errors
    assert "the same command goes on with it" in errors
    code, errors = run("dmd2", "train_edm.py", tmp_path / "again", *options)
    assert code == 0, errors
    assert len(disback.DegradationPath(tmp_path / "path")) == 4


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_trainer_of_another_shape_is_stopped_before_its_first_step(tmp_path):
    options = ("--path", tmp_path / "path", *PLAN)
    code, errors = run("sid", "sid_train.py", tmp_path / "out", *options, arguments=("--renamed",))
    assert code == 2
    assert "found no true_score in the local variables of training_loop()" in errors
    assert "mingyuanzhou/SiD at 01fbb13" in errors
    assert not (tmp_path / "path").exists()
    assert not (tmp_path / "out" / "losses.json").exists()


def test_the_wrong_adapter_is_stopped_at_the_first_step_with_what_it_waited_for(tmp_path):
    code, errors = run("sid", "train_edm.py", tmp_path / "out", "--path", tmp_path / "path")
    assert code == 2
    assert "first step of AdamW before any call of training.sid_loss:SID_EDMLoss.__call__" in errors


def test_gan_alone_is_refused_with_the_reason(tmp_path):
    options = ("--path", tmp_path / "path", *PLAN)
    code, errors = run("dmd2", "train_edm.py", tmp_path / "out", *options, arguments=("--gan_alone",))
    assert code == 2
    assert "--gan_alone" in errors


@pytest.mark.parametrize(
    ("adapter", "script", "message"),
    [
        ("sids", "sid_train.py", "found --adapter sids; expected one of"),
        ("sid", "no_such.py", "found no file"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(adapter, script, message, tmp_path):
    code, errors = run(adapter, script, tmp_path / "out")
    assert code == 2
    assert errors.startswith(f"disback: {message}")
    assert errors.count("\n") == 1


def test_a_script_that_ends_before_training_says_so(tmp_path):
    (tmp_path / "help.py").write_text("raise SystemExit(3)")
    code, errors = python("-m", "disback_plugin.cli", "run", "--adapter", "sid", tmp_path / "help.py")
    assert code == 3
    assert "nothing was attached" in errors


# -- in this process --------------------------------------------------------------------------------------------------


def forget_trainers():
    """Stand-ins of different tests share module names: one that is half there pickles classes of another."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("training", "networks", "main")]:
        del sys.modules[name]


@pytest.fixture
def _trainers(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINERS))
    forget_trainers()
    yield
    forget_trainers()


@pytest.mark.usefixtures("_trainers")
@pytest.mark.parametrize("renamed", [False, True])
def test_nothing_is_left_in_the_process(renamed, tmp_path):
    from torch.optim import optimizer

    from disback_plugin.launch.run import run as launch

    before = (
        sys.argv[:], sys.path[:], sys.meta_path[:], sys.modules["__main__"],
        len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks),
    )  # fmt: skip
    arguments = ["--outdir", str(tmp_path)] + ["--renamed"] * renamed
    options = {"adapter": "sid", "path": tmp_path / "path", "record": 2, "every": 1, "schedule": "fixed:2"}
    if renamed:
        with pytest.raises(disback.DisbackError):
            launch(TRAINERS / "sid_train.py", arguments, **options)
    else:
        launch(TRAINERS / "sid_train.py", arguments, **options)
    after = (
        sys.argv[:], sys.path[:], sys.meta_path[:], sys.modules["__main__"],
        len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks),
    )  # fmt: skip
    assert after == before
    from training import sid_loss, sid_training_loop

    for function in (sid_loss.SID_EDMLoss.__call__, sid_training_loop.save_pt):
        assert not hasattr(function, "__wrapped__")
    assert "AfterImport" not in repr(sid_loss.__spec__.loader) + repr(sid_loss.__loader__)


def test_local_variables_are_read_without_being_kept_alive():
    import gc
    import inspect
    import weakref

    from disback_plugin import Watch

    class Thing:
        pass

    watch = Watch("m:f", frame="loop", knows="a test", needs=("net",))

    def loop():
        net, other = Thing(), Thing()
        weak = weakref.ref(other)
        assert watch.trainer(inspect.currentframe()).net is net
        del other
        gc.collect()
        assert weak() is None
        return net

    assert isinstance(loop(), Thing)
