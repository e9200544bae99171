"""`disback run` without an adapter: any script whose variables the user names; and the stand-in of Self-Forcing."""

from __future__ import annotations

import json

import pytest
import torch
from scripts import PLAN, TRAINERS, disback_run, networks, run_plain
from worlds import difference

import disback_plugin as disback
from disback_plugin.plugins.log_reader import read

SID = ("--role", "teacher=true_score", "--role", "generator_optimizer=g_optimizer")
PLAIN = (
    *("--role", "teacher=nets.real", "--role", "fake_score=nets.fake", "--role", "generator_optimizer=opts.0"),
    *("--role", "fake_score_optimizer=first", "--role", "fake_score_optimizer=opts.1.1"),
)


@pytest.fixture
def run(tmp_path, capsys):
    """Run a script with a path in the working folder; return its exit code and what it said."""

    def run(*options, script, arguments=()):
        code = disback_run("--path", "path", *options, TRAINERS / script, *arguments)
        return code, capsys.readouterr().err

    return run


def read_states(folder):
    return [json.loads(line) for line in (folder / "path.states.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("watch", [(), ("--watch", "training.sid_loss:SID_EDMLoss.__call__")])
def test_local_variables_are_enough_for_both_stages(watch, run, tmp_path):
    code, errors = run(*SID, *watch, *PLAN, script="sid_train.py", arguments=("--outdir", tmp_path))
    assert code == 0, errors
    assert "disback: ended: <disback done: position 0 (N = 3" in errors
    assert difference(networks(tmp_path)[0], disback.DegradationPath(tmp_path / "path")[0]) == []


def test_a_script_without_functions_runs_and_resumes_from_its_own_checkpoint(run, tmp_path):
    options = (*PLAIN, *PLAN, "--schedule", "fixed:3,3", "--saves", "__main__:save")
    code, errors = run(*options, script="plain_loop.py", arguments=("--save_at", 15))
    assert code == 0, errors
    path, whole = disback.DegradationPath(tmp_path / "path"), networks(tmp_path)
    assert [node.iteration for node in path.nodes] == [2, 4, 6]
    assert difference(whole[0], path[0]) == []
    assert difference({**torch.load("saved.pt")["real"]}, path[0]) == [], "the checkpoint holds s'_0"
    (state,) = read_states(tmp_path)
    assert (state["phase"], state["generator_updates"]) == ("backtracking", 5)
    code, errors = run(*options, script="plain_loop.py", arguments=("--load", "saved.pt"))
    assert code == 0, errors
    assert "backtracking: position 1 (N = 3" in errors
    assert "5 generator updates" in errors


def test_a_function_of_the_user_measures_the_scripts_variables(run, tmp_path, monkeypatch):
    (tmp_path / "measures.py").write_text(
        "import torch\n"
        "def student(nets):\n"
        "    return {'distance': nets['student'](torch.ones(1, 2), torch.ones(1, 1)).norm()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    measured = ("--evaluate", "measures:student", "--evaluate-every", "4")
    code, errors = run(*PLAIN, *PLAN, *measured, script="plain_loop.py")
    assert code == 0, errors
    assert "disback: update 4: distance " in errors
    assert [update for update, _ in read(tmp_path / "path.log.jsonl").curves()["distance"]] == [0, 4, 8, 12]


def test_what_the_user_names_goes_back_to_its_beginning_after_the_recording(run):
    for restore, count in (((), "24"), (("--restore", "ramp"), "13")):
        code, errors = run(*PLAIN, *PLAN, "--path", f"path{count}", *restore, script="plain_loop.py")
        assert code == 0, errors
        with open("ramp") as file:
            assert file.read() == count


def test_the_path_is_where_it_was_typed_though_the_script_changes_its_folder(run, tmp_path):
    arguments = ("--chdir", "outputs/run1", "--save_at", "15")
    code, errors = run(*PLAIN, *PLAN, "--saves", "__main__:save", script="plain_loop.py", arguments=arguments)
    assert code == 0, errors
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "outputs",
        "path",
        "path.log.jsonl",
        "path.states.jsonl",
    ]
    assert not list((tmp_path / "outputs").rglob("path*"))


def test_a_script_that_ends_while_recording_has_trained_nothing_and_one_warning_says_so(run):
    code, errors = run(*PLAIN, script="plain_loop.py", arguments=("--steps", 3))
    assert code == 0
    assert errors.count("the script ended before the generator's first update: it was never trained") == 1
    assert "no optimizer step was seen" not in errors


def test_a_script_that_fails_before_its_first_step_is_not_told_about_optimizers(tmp_path, caplog):
    from disback_plugin.launch.run import ScriptRunner

    roles = {"teacher": "nets.real", "fake_score": "nets.fake", "generator_optimizer": "opts.0"}
    runner = ScriptRunner("", tmp_path / "path", roles=roles | {"fake_score_optimizer": "first,last"})
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        runner.run(TRAINERS / "plain_loop.py", ["--fails"])
    assert runner.handle is not None
    assert "no optimizer step was seen" not in caplog.text


@pytest.mark.parametrize(
    ("options", "script", "message"),
    [
        (("--watch", "training"), "sid_train.py", "found --watch training; expected module:function"),
        (("--watch", "__main__:step"), "plain_loop.py", "omit --watch"),
        ((*PLAIN, "--watch", "training.sid_loss:none"), "plain_loop.py", "before any call of training.sid_loss:none"),
        ((*PLAIN[:4], "--role", "generator_optimizer=optim"), "plain_loop.py",
         "no variable 'optim' for the generator optimizer where the networks are used; expected one of the script's "
         "own, each role an optimizer of its own: first, last, optimizer in the script"),
        (("--role", "teacher=nets.-1"), "plain_loop.py", "found --role teacher=nets.-1"),
        ((*PLAIN, "--restore", "rampe"), "plain_loop.py", "no variable 'rampe'"),
        ((*PLAIN, "--evaluate", "nowhere:f"), "plain_loop.py", "no function 'nowhere:f'"),
        ((*PLAIN, "--evaluate", "shutil:copyfile"), "plain_loop.py", "among src, dst"),
        ((), "sid_train.py", "use --adapter sid, which knows this trainer"),
        (PLAIN, "train_edm.py", "use --adapter dmd2, which knows this trainer"),
    ],
)  # fmt: skip
def test_wrong_names_stop_the_script_before_its_first_step(options, script, message, run, tmp_path):
    arguments = {"plain_loop.py": ()}.get(script, ("--output_path" if "edm" in script else "--outdir", tmp_path))
    code, errors = run(*options, script=script, arguments=arguments)
    assert code == 2
    assert message in errors
    assert list(tmp_path.iterdir()) == []


# -- Self-Forcing ------------------------------------------------------------------------------------------------------


def test_self_forcing_goes_on_at_the_position_of_the_generator_that_it_loads(run, tmp_path):
    options = ("--adapter", "self_forcing", "--record", 4, "--every", 2, "--codec", "exact", "--schedule", "ramp:8")
    arguments = ("--logdir", tmp_path)
    code, errors = run(*options, script="forcing_train.py", arguments=(*arguments, "--steps", 26, "--log_iters", 13))
    assert code == 0, errors
    recorded, _ = torch.load(tmp_path / "model_000013.pt"), torch.load(tmp_path / "model_000026.pt")
    assert [(s["phase"], s["generator_updates"]) for s in read_states(tmp_path)] == [
        ("backtracking", 1),
        ("backtracking", 4),
    ]
    more = (*arguments, "--generator_ckpt", tmp_path / "model_000026.pt")
    code, errors = run(*options, script="forcing_train.py", arguments=(*more, "--steps", 1))
    assert code == 0, errors
    assert "the trainer has restored the generator of update 4, but not the fake score of that moment" in errors
    assert "s_phi begins again as a copy of the teacher's active node" in errors
    code, errors = run(*options, script="forcing_train.py", arguments=more)
    assert code == 0, errors
    assert "disback: ended: <disback done: position 0 (N = 2" in errors
    assert difference(networks(tmp_path)[0], disback.DegradationPath(tmp_path / "path")[0]) == []
    assert recorded["generator"]


def test_self_forcings_teacher_may_be_larger_than_its_fake_score(run, tmp_path, monkeypatch):
    options = ("--adapter", "self_forcing", "--record", 7, "--every", 3, "--codec", "exact", "--schedule", "ramp:4")
    arguments = ("--logdir", tmp_path, "--real_width", 24)
    code, errors = run(*options, script="forcing_train.py", arguments=(*arguments, "--log_iters", 6, "--steps", 40))
    assert code == 0, errors
    assert "disback: ended: <disback done: position 0 (N = 3" in errors
    initial, real = torch.load(tmp_path / "model_000006.pt")["generator"], networks(tmp_path)[0]
    plain = tmp_path / "plain"
    plain.mkdir()
    monkeypatch.syspath_prepend(str(TRAINERS))
    run_plain(TRAINERS / "forcing_train.py", "--logdir", plain, "--real_width", 24, "--steps", 0)
    teacher, _, generator = networks(plain)
    assert difference(real, teacher) == []
    assert difference(initial, generator) == []
