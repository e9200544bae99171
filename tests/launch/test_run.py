"""`disback run` on stand-ins of the public trainers: their names and order of calls, every role where they keep it."""

from __future__ import annotations

import gc
import inspect
import json
import sys
import weakref

import pytest
import torch
from scripts import PLAN, TRAINERS, disback_run, networks, python, run_plain
from sites import KNOWS, install
from torch.optim import optimizer
from worlds import difference

import disback_plugin as disback
from disback_plugin import Watch, cli

SCRIPTS = [
    ("sid", "sid_train.py", "--outdir"),
    ("diff_instruct", "di_train.py", "--outdir"),
    ("dmd2", "train_edm.py", "--output_path"),
    ("dmd2", "train_sd.py", "--output_path"),
    ("lightx2v", "lightx2v_dmd.py", "--output_dir"),
]


@pytest.fixture
def run(tmp_path, capsys):
    """Run a script with a path in the working folder; return its exit code and what it said."""

    def run(adapter, script, *options, out="out", arguments=()):
        folder = tmp_path / out
        folder.mkdir(exist_ok=True)
        where = {name: flag for _, name, flag in SCRIPTS}.get(script)
        to = (where, folder) if where else ()
        options = ("--adapter", adapter, "--path", tmp_path / "path", *options)
        code = disback_run(*options, TRAINERS / script, *to, *arguments)
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(("adapter", "script", "where"), SCRIPTS)
def test_a_script_goes_through_both_stages_and_ends_on_its_teacher(adapter, script, where, run, tmp_path):
    code, errors = run(adapter, script, *PLAN)
    assert code == 0, errors
    assert "disback: attached to" in errors
    assert "recorded node 3 at iteration 6" in errors
    assert "disback: ended: <disback done: position 0" in errors
    path = disback.DegradationPath(tmp_path / "path")
    path.verify()
    assert [node.iteration for node in path.nodes] == [2, 4, 6]
    teacher, _, _ = networks(tmp_path / "out")
    assert difference(teacher, path[0]) == []


@pytest.mark.parametrize(("adapter", "script", "where"), SCRIPTS)
def test_the_losses_are_the_trainers_own_bit_for_bit_without_recording(adapter, script, where, run, tmp_path):
    (tmp_path / "plain").mkdir()
    run_plain(TRAINERS / script, where, tmp_path / "plain")
    code, errors = run(adapter, script, "--record", "0")
    assert code == 0, errors
    assert (tmp_path / "out" / "losses.json").read_text() == (tmp_path / "plain" / "losses.json").read_text()
    assert difference(networks(tmp_path / "out"), networks(tmp_path / "plain")) == []


def test_the_generator_does_not_move_while_recording(run, tmp_path):
    code, errors = run("sid", "sid_train.py", *PLAN, arguments=("--rounds", "6"))
    assert code == 0, errors
    path = disback.DegradationPath(tmp_path / "path")
    _, fake_score, generator = networks(tmp_path / "out")
    assert difference(generator, path[0]) == [], "SiD's generator starts as the teacher"
    assert difference(fake_score, path[3]) == []


# -- processes of their own -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_under_torchrun_backtrack_together_and_rank_0_logs(tmp_path):
    code, errors = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "disback_plugin.launch"),
        *("--adapter", "dmd2", "--path", "path", *PLAN, TRAINERS / "train_edm.py", "--output_path", tmp_path),
        cwd=tmp_path,
        ACCELERATE_USE_CPU="1",
    )
    assert code == 0, errors
    assert errors.count("disback: attached to") == 1
    assert errors.count("disback: ended: <disback done: position 0 (N = 3") == 1
    disback.DegradationPath(tmp_path / "path").verify()


def test_the_exit_code_of_the_script_is_that_of_the_process(tmp_path):
    (tmp_path / "help.py").write_text("raise SystemExit(3)")
    code, errors = python("-m", "disback_plugin.cli", "run", "--adapter", "sid", "help.py", cwd=tmp_path)
    assert code == 3
    assert "the script ended before a training step: nothing was attached" in errors


@pytest.mark.slow
def test_the_official_forks_own_swap_moves_nothing_and_ours_moves_every_weight(tmp_path):
    arguments = ("--step", "24000", "--start_target_num", "25000", "--interval", "1000", "--trajectory_dir", tmp_path)
    stored = tmp_path / "checkpoint_model_024900"
    stored.mkdir()
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
    teacher, _, _ = networks(tmp_path)
    assert difference(teacher, path[0]) == []


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_sids_own_resume_goes_on_where_the_path_was_and_ends_alike(run, tmp_path):
    options = (*PLAN, "--schedule", "fixed:3,3")
    code, errors = run("sid", "sid_train.py", *options, out="whole", arguments=("--rounds", "16", "--dump", "8"))
    assert code == 0, errors
    saved = tmp_path / "whole" / "training-state-000008.pt"
    states = [json.loads(line) for line in (tmp_path / "path.states.jsonl").read_text().splitlines()]
    assert [(state["phase"], state["generator_updates"]) for state in states] == [("backtracking", 2), ("done", 10)]
    code, errors = run("sid", "sid_train.py", *options, out="rest", arguments=("--rounds", "16", "--resume", saved))
    assert code == 0, errors
    assert "position 2 (N = 3" in errors
    assert "2 generator updates" in errors
    assert difference(networks(tmp_path / "rest"), networks(tmp_path / "whole")) == []


def test_dmd2s_checkpoint_holds_the_teacher_itself_and_not_the_active_node(run, tmp_path):
    from safetensors.torch import load_file

    options = (*PLAN, "--schedule", "fixed:9,9")
    code, errors = run("dmd2", "train_edm.py", *options, arguments=("--save_at", "13"))
    assert code == 0, errors
    (checkpoint,) = (tmp_path / "out").glob("checkpoint_*")
    saved = load_file(checkpoint / "model_1.safetensors")
    path = disback.DegradationPath(tmp_path / "path")
    teacher = {name.removeprefix("real_unet."): t for name, t in saved.items() if name.startswith("real_unet.")}
    assert difference(teacher, path[0]) == []
    code, errors = run("dmd2", "train_edm.py", *options, out="again", arguments=("--checkpoint_path", checkpoint))
    assert code == 0, errors
    assert "attached to tianweiy/DMD2" in errors
    assert "backtracking: position 2 (N = 3" in errors, "the run resumes where the checkpoint was"


# Its generator steps first: in round 4 backtracking begins, and the fake score's two updates wait at s'_N.
@pytest.mark.parametrize(("moment", "updates"), [(2, 4), (5, 8)])
def test_lightx2v_resumes_in_either_stage_and_ends_alike(run, tmp_path, moment, updates):
    script, whole = "lightx2v_dmd.py", tmp_path / "whole"
    code, errors = run("lightx2v", script, *PLAN, out="whole", arguments=("--save_at", moment))
    assert code == 0, errors
    (tmp_path / "path").rename(tmp_path / "other")
    code, errors = run("lightx2v", script, *PLAN, arguments=("--iterations", moment, "--save_at", moment))
    assert code == 0, errors
    saved = tmp_path / "out" / "checkpoint.pt"
    code, errors = run("lightx2v", script, *PLAN, out="rest", arguments=("--resume", saved))
    assert code == 0, errors
    assert f"{updates} fake-score updates>" in errors, "it goes on where the checkpoint was"
    assert difference(networks(tmp_path / "rest"), networks(whole)) == []


def test_lightx2vs_mixing_of_the_student_into_the_fake_score_is_named(run):
    code, errors = run("lightx2v", "lightx2v_dmd.py", *PLAN, arguments=("--ida",))
    assert code == 0, errors
    assert errors.count("training.dmd.ida mixes the student into the fake score") == 1


@pytest.mark.parametrize(("step", "phase"), [(4, "recording"), (12, "backtracking")])
def test_dmd2s_checkpoint_of_weights_alone_resumes_and_holds_the_teacher_itself(step, phase, run, tmp_path):
    options = (*PLAN, "--schedule", "fixed:9,9")
    code, errors = run("dmd2", "train_sd.py", *options, arguments=("--fsdp", "--save_at", step))
    assert code == 0, errors
    folder = tmp_path / "out" / f"checkpoint_{step:06d}"
    saved, path = torch.load(folder / "pytorch_model_1.bin"), disback.DegradationPath(tmp_path / "path")
    teacher = {name.removeprefix("real_unet."): t for name, t in saved.items() if name.startswith("real_unet.")}
    assert difference(teacher, path[0]) == []
    (state,) = [json.loads(line) for line in (tmp_path / "path.states.jsonl").read_text().splitlines()]
    assert state["phase"] == phase
    code, errors = run("dmd2", "train_sd.py", *options, out="again", arguments=("--ckpt_only_path", folder))
    assert code == 0, errors
    position = {"recording": "position 0", "backtracking": "position 2"}[phase]
    assert f"attached to tianweiy/DMD2 at 8d8fa55 (March 2025) and its fork SYZhang0805/DisBack at d015b5e: <disback "\
        f"{phase}: {position} (N = 3" in errors  # fmt: skip
    assert f"{state['generator_updates']} generator updates, {state['fake_score_updates']} fake-score" in errors


def test_an_interrupted_run_says_how_to_resume_and_resumes(run, tmp_path):
    code, errors = run("dmd2", "train_edm.py", *PLAN, arguments=("--interrupt_at", "4"))
    assert code == 130
    assert "stopped while recording, after 0 generator updates" in errors
    assert "the same command goes on with it" in errors
    code, errors = run("dmd2", "train_edm.py", *PLAN, out="again")
    assert code == 0, errors
    assert len(disback.DegradationPath(tmp_path / "path")) == 4


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_trainer_of_another_shape_is_stopped_before_its_first_step(run, tmp_path):
    code, errors = run("sid", "sid_train.py", *PLAN, arguments=("--renamed",))
    assert code == 2
    assert "found no true_score in the local variables of training_loop()" in errors
    assert "mingyuanzhou/SiD at 01fbb13" in errors
    assert not (tmp_path / "path").exists()
    assert not (tmp_path / "out" / "losses.json").exists()


@pytest.mark.parametrize(
    ("adapter", "script", "arguments", "message"),
    [
        ("sid", "train_edm.py", (), "first step of AdamW before any call of training.sid_loss:SID_EDMLoss.__call__"),
        ("sid", "train_edm.py", (), "use --adapter dmd2, which knows this trainer"),
        ("dmd2", "forcing_train.py", ("--logdir", "."), "use --adapter self_forcing, which knows this trainer"),
        ("dmd2", "train_edm.py", ("--renamed", "fake_unet"), "no model.guidance_model.fake_unet in self of train_one_"),
        ("dmd2", "train_edm.py", ("--renamed", "real_unet"), "no 'real_unet' of prefix 'real_unet' in EDMGuidance"),
        ("dmd2", "train_edm.py", ("--gan_alone",), "--gan_alone"),
        ("sids", "sid_train.py", (), "disback: found --adapter sids; expected one of"),
        ("sid", "no_such.py", (), "disback: found no file"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(adapter, script, arguments, message, run):
    code, errors = run(adapter, script, arguments=arguments)
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1


def test_a_blocked_adapter_is_refused_and_not_imported(site, tmp_path, capsys):
    install(site, "noisy", f"{KNOWS}\nprint('imported')", group="disback.adapters")
    (tmp_path / "script.py").write_text("")
    for arguments in (["-p", "no:noisy", "run"], ["run", "-p", "no:noisy"]):
        assert cli.main([*arguments, "--adapter", "noisy", "script.py"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "noisy" in err
    assert cli.main(["run", "--adapter", "noisy", "script.py"]) == 2
    assert capsys.readouterr().out == "imported\n", "without a WATCH it cannot run a script"


@pytest.mark.parametrize("renamed", [False, True])
def test_nothing_is_left_in_the_process(renamed, tmp_path):
    from disback_plugin.launch.run import ScriptRunner

    def state():
        hooks = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks
        return sys.argv[:], sys.path[:], sys.meta_path[:], sys.modules["__main__"], *map(len, hooks)

    before = state()
    arguments = ["--outdir", str(tmp_path)] + ["--renamed"] * renamed
    runner = ScriptRunner("sid", tmp_path / "path", record=2, every=1, schedule="fixed:2")
    if renamed:
        with pytest.raises(disback.DisbackError):
            runner.run(TRAINERS / "sid_train.py", arguments)
    else:
        runner.run(TRAINERS / "sid_train.py", arguments)
    assert state() == before
    from training import sid_loss, sid_training_loop

    for function in (sid_loss.SID_EDMLoss.__call__, sid_training_loop.save_pt):
        assert not hasattr(function, "__wrapped__")
    assert "exec_module" not in {**vars(sid_loss.__spec__.loader), **vars(sid_loss.__loader__)}


def test_a_script_that_catches_the_error_is_stopped_at_its_first_optimizer_step(tmp_path):
    from disback_plugin.launch.run import ScriptRunner

    (tmp_path / "stubborn.py").write_text(
        "import sys, torch\n"
        "from training.sid_training_loop import training_loop\n"
        "try:\n"
        f"    training_loop({str(tmp_path)!r}, 1, 9, None, renamed=True)\n"
        "except ValueError:\n"
        "    torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1).step()\n"
    )
    with pytest.raises(disback.DisbackError, match="no true_score"):
        ScriptRunner("sid", tmp_path / "path").run(tmp_path / "stubborn.py")


def test_local_variables_are_read_without_being_kept_alive():
    class Thing:
        pass

    watch = Watch("m:f", frame="loop", knows="a test", needs=("net",))

    def loop():
        net, other = Thing(), Thing()
        weak = weakref.ref(other)
        assert watch.find_trainer(inspect.currentframe()).net is net
        del other
        gc.collect()
        assert weak() is None
        return net

    assert isinstance(loop(), Thing)
