"""Every command of benchmarks/paper/README.md starts: bash expands it, its parsers take it, it makes ten updates."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import published_flags
import pytest
import tiny_pipelines
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from disback_adapters.lcm_lora.__main__ import main
from scripts import TRAINERS, disback_run, forget_trainers, run_plain
from torch.distributed.run import get_args_parser

import disback_plugin as disback
from disback_plugin.plugins import log_reader
from disback_plugin.schedules import recipes

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "benchmarks" / "paper"
BLOCKS = re.findall(r"```sh\n(.*?)```", (FOLDER / "README.md").read_text(), flags=re.DOTALL)
COMMON, *REST = BLOCKS
SETTINGS = [block for block in REST if "SCRIPT=" in block]
FIVE, LCM_FIVE = (block for block in REST if "RAMP=" in block)
LCM_SETTINGS = [block for block in REST if "START=" in block]
(EVALUATION,) = [block for block in REST if "sid_metrics" in block]
# The stand-in of a script, and the flags of its folder and of its rounds.
STAND_INS = {
    "di_train.py": ("di_train.py", "--outdir", "--rounds"),
    "sid_train.py": ("sid_train.py", "--outdir", "--rounds"),
    "main/train_sd.py": ("train_sd.py", "--output_path", "--train_iters"),
}
UPDATES = 10
NAMES = ["baseline", "disback", "paper", "ramp", "faster"]

RECORDER = """#!{python}
import json, os, sys
with open({log!r}, "a") as f:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=f)
if "--ramp" in sys.argv:
    print(21)
if "--fid" in sys.argv:  # as torch-fidelity prints it
    print("frechet_inception_distance: 36.37")
"""


@pytest.fixture
def expand(tmp_path):
    """Return the commands of blocks as bash expands them; a program is only written down."""

    def expand(*blocks):
        log, programs = tmp_path / "commands.jsonl", tmp_path / "programs"
        log.unlink(missing_ok=True)
        programs.mkdir(exist_ok=True)
        for name in ("torchrun", "accelerate", "python", "fidelity"):
            (programs / name).write_text(RECORDER.format(python=sys.executable, log=str(log)))
            (programs / name).chmod(0o755)
        values = {
            "PAPER": str(FOLDER),
            "MASTER_IP": "10.0.0.1",
            "DATA": "data",
            "WANDB_ENTITY": "e",
            "WANDB_PROJECT": "p",
        }
        values |= {"SNAPSHOT": "a.pkl", "FOLDER": "runs", "OUT": "runs"}
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "di_train.py").write_text("    resume_specs = {\n        'cifar10-uncond': 'a',\n    }\n")
        for name in NAMES:
            (tmp_path / "runs" / "lcm-sd15" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "runs" / "lcm-sdxl" / name).mkdir(parents=True, exist_ok=True)
        environment = os.environ | values | {"PATH": f"{programs}:{os.environ['PATH']}"}
        script = "set -euo pipefail\n" + "\n".join(blocks)
        subprocess.run(["bash", "-c", script], check=True, cwd=tmp_path, env=environment)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return expand


def launched(command):
    """Return (module or None, script or module's arguments) of a command of torchrun, by torchrun's own parser."""
    program, *rest = command
    if program == "torchrun":
        options = get_args_parser().parse_args(rest)
        assert options.nproc_per_node in ("4", "8")
    else:
        assert rest.pop(0) == "launch"
        options = launch_command_parser().parse_args(rest)
    arguments = [options.training_script, *options.training_script_args]
    return (arguments.pop(0) if options.module else None), arguments


def value(arguments, flag):
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def test_the_page_has_the_settings_of_the_paper():
    assert len(SETTINGS) == 8
    assert len(LCM_SETTINGS) == 2
    assert len(BLOCKS) == 1 + 8 + 1 + 2 + 1 + 1


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda block: re.search(r"OUT=\S*?/([\w-]+)", block)[1])
def test_the_five_commands_of_a_setting_start_and_make_ten_updates(setting, expand, tmp_path, monkeypatch, capsys):
    commands = expand(COMMON, setting, FIVE)
    assert [command[0] for command in commands] == ["torchrun"] * 3 + ["python"] + ["torchrun"] * 2
    names, flags = [], []
    monkeypatch.syspath_prepend(str(TRAINERS))
    monkeypatch.chdir(tmp_path)
    for command in commands[:3] + commands[4:]:
        module, arguments = launched(command)
        position = next(i for i, argument in enumerate(arguments) if argument.endswith(".py"))
        ours, script, theirs = arguments[:position], arguments[position], arguments[position + 1 :]
        known = published_flags.parse(script, theirs)
        stand_in, where, rounds = STAND_INS[script]
        out = tmp_path / known.pop(where.strip("-"))
        out.mkdir(parents=True)
        names.append(out.name)
        flags.append(known)
        length = UPDATES + recording(ours)
        small = [
            TRAINERS / stand_in,
            where,
            out,
            rounds,
            *(["--dfake_gen_update_ratio", "1"] if "sd" in stand_in else []),
        ]
        small.insert(4, length)
        if module is None:
            assert not ours
            run_plain(*small)
        else:
            assert module == "disback_plugin.launch"
            assert value(ours, "--adapter")
            assert disback_run(*ours, *small) in (0, None)
            assert "disback: attached to" in capsys.readouterr().err
            progress(tmp_path / value(ours, "--path"), out.name)
        assert (out / "losses.json").exists()
    assert names == NAMES
    assert flags[0] == flags[1] == flags[2] == flags[3]
    rates = [name for name in flags[0] if name in ("lr", "glr", "generator_lr", "guidance_lr")]
    assert len(rates) == 2
    assert {name: flags[4][name] / flags[0][name] for name in rates} == pytest.approx(dict.fromkeys(rates, 1.25))
    assert {**flags[4], **{name: flags[0][name] for name in rates}} == flags[0]


def recording(ours):
    if "--record" in ours:
        return int(value(ours, "--record"))
    recipe = value(ours, "--recipe")
    return 0 if not ours else disback.schedules.recipe(recipe).record if recipe else 200


def progress(path, name):
    """Assert that the run recorded what its method says."""
    if name == "ramp":
        assert not path.exists()
        return
    manifest = disback.DegradationPath(path).manifest
    assert manifest.iterations == 200 or name == "disback" or "sdxl" in str(path)
    assert log_reader.read(path.with_name(f"{path.name}.log.jsonl")).recorded == manifest.iterations


def test_the_sed_adds_both_teachers_to_diff_instructs_table(expand, tmp_path):
    expand(COMMON, SETTINGS[1], 'python "$ADAPTER"')
    names = {}
    exec(
        compile(
            (tmp_path / "di_train.py").read_text().replace("    resume", "resume", 1).replace("    }", "}"), "", "exec"
        ),
        names,
    )
    assert list(names["resume_specs"]) == ["ffhq64", "imagenet64-cond", "cifar10-uncond"]
    assert all(url.startswith("https://") for url in list(names["resume_specs"].values())[:2])


@pytest.fixture
def teacher(request, tmp_path, monkeypatch):
    """A tiny pipeline, and recipes of few iterations."""
    few = {
        name: replace(recipe, record=recipe.record // 50, every=recipe.every // 50)
        for name, recipe in recipes().items()
    }
    monkeypatch.setattr(disback.schedules, "recipes", lambda: few)
    monkeypatch.chdir(tmp_path)
    yield str(tiny_pipelines.save(request.param, tmp_path / request.param))
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("setting", "teacher"), list(zip(LCM_SETTINGS, ["sd15", "sdxl"], strict=True)), indirect=["teacher"]
)
def test_the_commands_of_the_lcm_lora_trainer_start_and_make_ten_updates(setting, teacher, expand, tmp_path):
    commands = expand(setting, LCM_FIVE)
    trained, shown = (
        [c for c in commands if c[0] == "accelerate"],
        [c for c in commands if c[0] in ("python", "fidelity")],
    )
    (tmp_path / "prompts.txt").write_text("the digit seven\na red cube\n")
    small = [
        "--teacher",
        teacher,
        "--steps",
        str(UPDATES),
        "--batch_size",
        "2",
        "--rank",
        "4",
        "--mixed_precision",
        "no",
    ]
    start = None
    for command in trained:
        module, arguments = launched(command)
        assert (module, arguments[0]) == ("disback_adapters.lcm_lora", "student")
        if "--student_lora" in arguments:
            at = arguments.index("--student_lora") + 1
            arguments[at - 1 : at + 1] = ["--student_lora", str(start)] if start else []
        out = tmp_path / value(arguments, "--output")
        more = ["--record", "6", "--every", "3"] if out.name == "disback" else []
        assert main([*arguments, *small, *more]) == 0
        AcceleratorState._reset_state(True)
        start = start or out
        assert (out / "pytorch_lora_weights.safetensors").exists()
        if path := value(arguments, "--path"):
            records = recipes()[value(arguments, "--recipe")].record // 50 if "--recipe" in arguments else 6
            assert disback.DegradationPath(tmp_path / path).manifest.iterations == records
    assert [Path(value(c, "--output")).name for c in trained] == NAMES
    ramp, *shown = shown
    assert ramp[2] == "--ramp"
    assert [c[0] for c in shown] == ["python", "fidelity"] * 5
    logged = {(tmp_path / setting.split("OUT=")[1].split(";")[0] / out / "fid.log").read_text() for out in NAMES}
    assert logged == {"checkpoint _10000 fid 36.37\n"}
    _, script, *arguments = shown[0]
    assert script == str(FOLDER / "sample.py")
    (tmp_path / "coco-30k.txt").write_text("the digit one\n")
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(script)["main"]([*arguments, "--teacher", teacher])
    assert [image.name for image in (tmp_path / value(shown[1], "--input1")).iterdir()] == ["000000.png"]


def test_the_commands_of_the_evaluation_parse(expand):
    sid, sd, sdxl, compare = expand(EVALUATION)
    _, arguments = launched(sid)
    assert published_flags.parse(arguments[0], arguments[1:])["network"] == "a.pkl"
    for program, script, *rest in (sd, sdxl):
        assert program == "python"
        assert published_flags.parse(script, rest)["folder"] == "runs"
    assert compare[1] == str(FOLDER / "compare.py")
    assert shlex.join(compare[2:]).endswith("--png fig1.png")
    forget_trainers()
