"""Scripts that call `Accelerator.prepare` and that nobody edits: the user names the teacher and the fake score."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from scripts import PLAN, TRAINERS, disback_run, networks, python, run_plain
from torch import nn
from worlds import Run, Score, difference

import disback_plugin as disback
from disback_plugin.errors import MismatchError, RoleError
from disback_plugin.launch.hooks import FirstForward
from disback_plugin.launch.run import ScriptRunner
from disback_plugin.testing import check_adapter
from disback_plugin.weights.network import ScoreNetwork

ROLES = {
    "accelerate_globals.py": ("--role", "teacher=real_unet", "--role", "fake_score=fake_unet"),
    "accelerate_function.py": ("--role", "teacher=run.critics.real", "--role", "fake_score=run.critics.fake"),
}
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
SHARDED = (
    *("-m", *TORCHRUN, "-m", "disback_plugin.launch"),
    *("--adapter", "accelerate_loop", "--role", "fake_score=critic"),
)
ACCELERATE = (
    *("accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"),
    *("--dynamo_backend=no", "--num_cpu_threads_per_process=1", "--main_process_port=0"),
)


@pytest.fixture
def run(tmp_path, capsys):
    """Run a script with a path in the working folder; return its exit code and what it said."""

    def run(script, *options, out="out", arguments=()):
        (tmp_path / out).mkdir(exist_ok=True)
        options = ("--adapter", "accelerate_loop", "--path", tmp_path / "path", *options)
        code = disback_run(*options, TRAINERS / script, "--outdir", tmp_path / out, *arguments)
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("script", "arguments"), [("accelerate_function.py", ()), ("accelerate_globals.py", ("--third",))]
)
def test_two_names_are_enough_for_both_stages(script, arguments, run, tmp_path):
    code, errors = run(script, *ROLES[script], *PLAN, arguments=arguments)
    assert code == 0, errors
    assert "disback: ended: <disback done: position 0 (N = 3" in errors
    path = disback.DegradationPath(tmp_path / "path")
    path.verify()
    assert [node.iteration for node in path.nodes] == [2, 4, 6]
    assert difference(networks(tmp_path / "out")[0], path[0]) == []


@pytest.mark.parametrize("script", ROLES)
def test_without_recording_the_losses_are_the_scripts_own_bit_for_bit(script, run, tmp_path):
    code, errors = run(script, *ROLES[script], "--record", 0)
    assert code == 0, errors
    (tmp_path / "plain").mkdir()
    run_plain(TRAINERS / script, "--outdir", tmp_path / "plain")
    assert (tmp_path / "out" / "losses.json").read_text() == (tmp_path / "plain" / "losses.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "launcher"),
    [
        pytest.param("accelerate_globals.py", TORCHRUN, id="torchrun"),
        pytest.param("accelerate_function.py", ACCELERATE, id="accelerate"),
    ],
)
def test_two_processes_backtrack_together(script, launcher, tmp_path):
    code, errors = python(
        *("-m", *launcher, "-m", "disback_plugin.launch", "--adapter", "accelerate_loop", "--path", "path"),
        *(*ROLES[script], *PLAN, TRAINERS / script, "--outdir", tmp_path),
        cwd=tmp_path,
    )
    assert code == 0, errors
    assert errors.count("disback: attached to") == 1
    assert errors.count("disback: ended: <disback done: position 0 (N = 3") == 1
    assert difference(networks(tmp_path)[0], disback.DegradationPath(tmp_path / "path")[0]) == []


@pytest.mark.slow
def test_a_run_resumes_from_the_scripts_own_checkpoint(run, tmp_path):
    script = "accelerate_globals.py"
    options = (*ROLES[script], *PLAN, "--schedule", "fixed:3,3")
    code, errors = run(script, *options, out="whole", arguments=("--save_at", 18))
    assert code == 0, errors
    (state,) = map(json.loads, (tmp_path / "path.states.jsonl").read_text().splitlines())
    assert (state["phase"], state["generator_updates"]) == ("backtracking", 2)
    assert difference(networks(tmp_path / "whole")[0], disback.DegradationPath(tmp_path / "path")[0]) == []
    saved = tmp_path / "whole" / "checkpoint-18"
    code, errors = run(script, *options, out="rest", arguments=("--load", saved))
    assert code == 0, errors
    assert "backtracking: position 2 (N = 3" in errors
    assert difference(networks(tmp_path / "rest"), networks(tmp_path / "whole")) == []


@pytest.mark.parametrize("stop", [3, 9])
def test_the_teacher_may_be_the_fake_score_with_its_lora_switched_off_and_the_run_resumes(stop, run, tmp_path):
    roles = ("--role", "teacher=teacher_lora", "--role", "fake_score=teacher_lora", *PLAN)
    script = "accelerate_switched_off.py"
    code, errors = run(script, *roles, arguments=("--save_at", str(stop)))
    assert code == 0, errors
    assert "disback: ended: <disback done: position 0 (N = 3" in errors
    checkpoint = tmp_path / "out" / f"checkpoint-{stop}"
    code, errors = run(script, *roles, out="again", arguments=("--load", str(checkpoint)))
    assert (code, "saved" in errors, "done: position 0" in errors) == (0, False, True), errors
    ends = [torch.load(tmp_path / out / "networks.pt") for out in ("out", "again")]
    losses = [json.loads((tmp_path / out / "losses.json").read_text()) for out in ("out", "again")]
    assert losses[1] == losses[0][2 * stop :]
    assert difference(*({"g": g, "f": f} for g, f in ends)) == []
    assert set(ends[0][1]) == {n for n in ends[0][1] if ".disback" not in n}


@pytest.mark.slow
def test_a_sharded_run_resumes_from_the_scripts_own_shards(tmp_path):
    options = ("--path", "path", "--record", 4, "--every", 2, "--schedule", "ramp:40")
    found = []
    for _ in range(2):
        code, errors = python(*SHARDED, *options, TRAINERS / "sharded_accelerate.py", cwd=tmp_path)
        assert code == 0, errors
        found += re.findall(r"attached to [^\n]*?(\d+) generator updates", errors)
    saved = [
        json.loads(line)["generator_updates"] for line in (tmp_path / "path.states.jsonl").read_text().splitlines()
    ]
    assert saved[0] > 0
    assert list(map(int, found)) == [0, saved[0]]


@pytest.mark.slow
def test_accelerates_own_fsdp2_resumes_in_both_stages_and_ends_alike(tmp_path):
    options = ("--record", 4, "--every", 2, "--schedule", "fixed:3", TRAINERS / "fsdp2_accelerate.py", "--rounds")

    def run(folder, *arguments):
        code, errors = python(*SHARDED, "--path", folder, *options, *arguments, cwd=tmp_path)
        assert code == 0, errors
        return re.search(r"attached to [^\n]*<disback (\w+)[^\n]*?(\d+) generator updates, (\d+) fake-score", errors)

    run("parts", 3)
    for name in ("parts", "parts.states.jsonl"):
        copied = shutil.copytree if (tmp_path / name).is_dir() else shutil.copy
        copied(tmp_path / name, tmp_path / name.replace("parts", "other"))
    assert run("parts", 6, "--resume", "state-3").groups() == ("recording", "0", "3")
    assert run("parts", 9, "--resume", "state-6").groups() == ("backtracking", "2", "6")
    assert run("other", 9, "--resume", "state-3").groups() == ("recording", "0", "3")
    ends = [torch.load(tmp_path / f"end-9-state-{start}.pt") for start in (6, 3)]
    for one, other in zip(*ends, strict=True):
        assert all(map(torch.equal, one, other))
    path = disback.DegradationPath(tmp_path / "parts")
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    assert all(torch.equal(tensor, path[0][name]) for name, tensor in zip(names, ends[0][0], strict=True))
    assert [node.iteration for node in path.nodes] == [2, 4]


@pytest.mark.parametrize(
    ("script", "roles", "arguments", "message"),
    [
        ("accelerate_globals.py", ("teacher=reel_unet", "fake_score=fake_unet"), (),
         "found no variable 'reel_unet' for the teacher where the networks are used; "
         "expected one of the script's own, each role a network of its own: fake_unet, real_unet, unet in the script"),
        ("accelerate_globals.py", ("teacher=real_unet", "fake_score=accelerator"), (), "Accelerator as the fake score"),
        ("accelerate_globals.py", ("teacher=fake_unet", "fake_score=fake_unet"), (), "fake score that share weights"),
        ("accelerate_globals.py", ("teacher=fake_unet", "fake_score=real_unet"), (), "no prepared optimizer steps"),
        ("accelerate_globals.py", ("techer=real_unet",), (), "found --role techer=real_unet; expected one of teacher,"),
        ("accelerate_globals.py", ("teacher",), (), "found --role teacher="),
        ("accelerate_function.py", ("teacher=run.critics.real", "fake_score=run.critics.fake"), ("--unprepared",),
         "no prepared optimizer steps"),
        ("sid_train.py", ("teacher=real_unet", "fake_score=fake_unet"), (), "before any call of accelerate."),
    ],
)  # fmt: skip
def test_wrong_roles_stop_the_script_before_its_first_step(script, roles, arguments, message, tmp_path):
    roles = dict(role.partition("=")[::2] for role in roles)
    with pytest.raises(disback.DisbackError) as raised:
        ScriptRunner("accelerate_loop", tmp_path / "path", roles=roles).run(
            TRAINERS / script, ("--outdir", str(tmp_path), *arguments)
        )
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_role_is_one_line_of_the_command(run):
    code, errors = run("accelerate_globals.py", "--role", "teacher=real_unet")
    assert code == 2
    assert "disback: found no variable 'fake_score'" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_an_adapter_that_knows_the_roles_takes_none(tmp_path):
    with pytest.raises(disback.DisbackError, match="which knows where the roles are"):
        ScriptRunner("sid", tmp_path / "path", roles={"teacher": "net"})


# -- without a script --------------------------------------------------------------------------------------------------


def prepared_run(run):
    accelerator = Accelerator(cpu=True)
    names = ("teacher", "fake_score", "generator", "optimizer_f", "optimizer_g")
    for name, each in zip(names, accelerator.prepare(*(getattr(run, name) for name in names)), strict=True):
        setattr(run, name, each)
    return accelerator


def test_the_kit_passes_the_adapter():
    def make():
        run = Run()
        run.accelerator = prepared_run(run)
        return run, run.step

    check_adapter("accelerate_loop", make)


class Discriminator(nn.Module):
    """A discriminator whose heads stand on the teacher's features, and which keeps the teacher as an attribute."""

    def __init__(self, teacher):
        super().__init__()
        self.backbone, self.head = teacher, nn.Linear(2, 1)


@pytest.mark.parametrize("student", ["other", "class", "lora"])
def test_of_three_optimizers_the_generators_steps_a_network_of_the_teachers_class(student, tmp_path, caplog):
    run = Run()
    discriminator = Discriminator(run.teacher)
    if student != "other":
        run.generator = Score()
    if student == "lora":
        run.generator.requires_grad_(False)
        run.generator.left.lora_A = nn.Linear(2, 1)
    trained = [parameter for parameter in run.generator.parameters() if parameter.requires_grad]
    run.optimizer_g = torch.optim.Adam(trained, lr=1e-2)
    optimizer_d = torch.optim.SGD(discriminator.head.parameters(), lr=0.1)
    run.accelerator = prepared_run(run)
    run.accelerator.prepare(discriminator, optimizer_d)
    if student == "other":  # nothing tells it from the discriminator
        with pytest.raises(RoleError, match="2 prepared optimizers beside the fake score's, 0 of them"):
            disback.attach(run, adapter="accelerate_loop", path=tmp_path)
        run.generator_optimizer = run.optimizer_g
    caplog.set_level("INFO")
    with disback.attach(run, adapter="accelerate_loop", path=tmp_path) as handle:
        assert handle.phase == "recording"
        assert run.optimizer_g.optimizer._optimizer_step_pre_hooks
        assert not optimizer_d._optimizer_step_pre_hooks
    assert ("the active node's during backtracking" in caplog.text) is (student != "other")


def test_two_networks_of_the_teachers_class_beside_it_are_a_question(tmp_path):
    run = Run()
    run.generator, second = Score(), Score()
    run.optimizer_g = torch.optim.Adam(run.generator.parameters(), lr=1e-2)
    run.accelerator = prepared_run(run)
    run.accelerator.prepare(second, torch.optim.SGD(second.parameters(), lr=0.1))
    with pytest.raises(RoleError, match=r"2 of them for a network of the teacher's class.*--role generator_optimizer="):
        disback.attach(run, adapter="accelerate_loop", path=tmp_path)


def test_a_fake_score_of_another_architecture_is_refused_with_what_works(tmp_path):
    run = Run()
    run.fake_score = nn.Sequential(nn.Linear(3, 3))
    run.optimizer_f = torch.optim.Adam(run.fake_score.parameters())
    run.accelerator = prepared_run(run)
    with pytest.raises(MismatchError, match=r"disback\.record\(teacher, sample="):
        disback.attach(run, adapter="accelerate_loop", path=tmp_path)


def test_only_a_forward_that_records_gradients_is_the_moment_and_nothing_stays():
    net, seen = nn.Sequential(Score(), nn.Identity()), []
    forwards = FirstForward(lambda: seen.append("now"), prepared_only=True)
    net[0](torch.zeros(2, 2), torch.ones(2, 1))
    assert seen == [], "not prepared yet"
    forwards.add((net, "a scheduler"))
    forwards.add(net)
    assert forwards.prepared == [net, "a scheduler"]
    with torch.no_grad():
        net[0](torch.zeros(2, 2), torch.ones(2, 1))
    assert seen == []
    net[0](torch.zeros(2, 2), torch.ones(2, 1))  # not the root: what is inside counts
    assert seen
    forwards.close()
    count = len(seen)
    net[0](torch.zeros(2, 2), torch.ones(2, 1))
    assert len(seen) == count


def test_a_frozen_network_may_run_before_but_is_remembered():
    frozen, trained, seen = nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1), []
    forwards = FirstForward(lambda: seen.append("now"))
    frozen(torch.ones(1, 1))
    assert seen == []
    assert forwards.have_run([ScoreNetwork(frozen)])
    assert not forwards.have_run([ScoreNetwork(trained)])
    trained(torch.ones(1, 1))
    assert seen == ["now"]
    forwards.close()


UNSUITED = {
    "flash-diffusion": ("teacher_denoiser", "student_denoiser", "disc_backbone"),
    "consistency distillation": ("teacher_unet", "unet", "target_unet"),
}


@pytest.mark.parametrize("trainer", UNSUITED)
def test_a_trainer_without_a_fake_score_is_refused_with_why_and_what_works(trainer, tmp_path):
    model = SimpleNamespace(**{name: nn.Linear(1, 1) for name in UNSUITED[trainer]})
    with pytest.raises(RoleError, match=f"{trainer}.* has no fake score.*train with score distillation.*DMD2"):
        disback.attach(model, path=tmp_path)


def test_a_trainer_with_such_names_and_a_fake_score_is_not_refused_for_them(tmp_path):
    run = Run()
    run.teacher_unet, run.unet, run.accelerator = run.teacher, run.generator, prepared_run(run)
    disback.attach(run, path=tmp_path).detach()
