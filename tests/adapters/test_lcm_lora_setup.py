"""The trainer of LCM-LoRA students before its first step: the student, the prompts, and what does not fit."""

from __future__ import annotations

import json

import pytest
import tiny_pipelines
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from disback_adapters.lcm_lora import pipelines, training
from disback_adapters.lcm_lora.pipelines import Embeddings
from disback_adapters.lcm_lora.roles import Options, noised, read
from disback_adapters.lcm_lora.training import Trainer
from lcm_students import PROMPTS, options, same, train

from disback_plugin import noise
from disback_plugin.errors import DisbackError, MismatchError, OptionError, RoleError

pytestmark = pytest.mark.usefixtures("fresh")


# -- the student, and what the networks are given ---------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "timestep"), [("epsilon", 999), ("v_prediction", 499), ("sample", 20)])
def test_the_student_is_lcms_parametrisation(tmp_path, prediction, timestep):
    teacher = tiny_pipelines.save("sd15", tmp_path / "t", prediction_type=prediction)
    trainer = Trainer(options(str(teacher), tmp_path / "o", timestep=timestep))
    z, conditions = torch.randn(2, 4, 8, 8), trainer.embeddings.rows([0, 2])
    t = torch.tensor([timestep] * 2)
    with torch.no_grad():
        output, x = trainer.student(z, t, conditions), trainer.student.generate(z, conditions)
    alpha, sigma = (value.view(2, 1, 1, 1) for value in trainer.teacher.noise(t))
    x_0 = {"epsilon": (z - sigma * output) / alpha, "v_prediction": alpha * z - sigma * output, "sample": output}
    scaled = 10.0 * timestep  # arXiv 2310.04378, Eq. 9, with sigma_data = 0.5
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
    torch.testing.assert_close(x, c_skip * z + c_out * x_0[prediction], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", tiny_pipelines.KINDS)
def test_the_two_guidance_branches_are_what_the_pipeline_itself_would_ask(teachers, tmp_path, kind):
    trainer = Trainer(options(teachers[kind], tmp_path))
    pipeline = DiffusionPipeline.from_pretrained(teachers[kind])
    asked = []
    network = getattr(pipeline, trainer.teacher.component)
    network.register_forward_pre_hook(lambda module, args, kwargs: asked.append((args, kwargs)), with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPTS[0], num_inference_steps=2, guidance_scale=5.0, output_type="latent")
    _, kwargs = asked[0]
    own = {**kwargs, **(kwargs.get("added_cond_kwargs") or {})}
    conditions, null = trainer.embeddings.rows([0]), trainer.embeddings.null
    assert conditions.keys() == set(trainer.teacher.conditions)
    for name in conditions:
        torch.testing.assert_close(torch.cat([null[name], conditions[name]]), own[name].to(conditions[name]))


def test_times_are_drawn_from_both_ends_of_the_range_as_dmd2_does():
    schedule, stream = noise.Discrete([0.9 - 0.0009 * t for t in range(1000)]), torch.Generator().manual_seed(0)
    _, t, _, _ = noised(schedule, torch.zeros(50_000, 1), *training.COMPARED, generator=stream)
    assert (t.min().item(), t.max().item()) == (20, 980)
    _, t, _, _ = noised(schedule, torch.zeros(50_000, 1), generator=stream)
    assert (t.min().item(), t.max().item()) == (0, 999)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_text_is_encoded_once_and_the_encoders_are_let_go(teachers, tmp_path, monkeypatch):
    first = Trainer(options(teachers["sdxl"], tmp_path))
    assert first.pipeline.text_encoder is None
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(Embeddings, "write", lambda *args: pytest.fail("encoded again"))
    again = Trainer(options(teachers["sdxl"], tmp_path))
    assert again.pipeline.text_encoder_2 is None
    assert same(again.embeddings.rows([2, 0]), first.embeddings.rows([2, 0]))


def test_other_prompts_are_encoded_anew(teachers, tmp_path):
    first = Trainer(options(teachers["sd15"], tmp_path)).embeddings.rows([0])
    AcceleratorState._reset_state(True)
    other = Options(teacher=teachers["sd15"], prompts=["a cat"], output=str(tmp_path), rank=4)
    assert not same(Trainer(other).embeddings.rows([0]), first)


def test_rows_come_from_their_files_however_many_there_are(teachers, trained, tmp_path, monkeypatch):
    whole = [trained.embeddings.rows([index]) for index in range(3)]
    monkeypatch.setattr(pipelines, "ROWS", 2)
    parts = Trainer(options(teachers["sd15"], tmp_path / "b")).embeddings
    assert len(list((tmp_path / "b" / "embeddings").rglob("0*.safetensors"))) == 2
    for index in range(3):
        torch.testing.assert_close(parts.rows([index]), whole[index])


# -- what does not fit ------------------------------------------------------------------------------------------------


def quantised(folder):
    file = tiny_pipelines.save("sd15", folder) / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "x"}}))


def without_added_conditions(folder):
    tiny_pipelines.save("sd15", folder, **tiny_pipelines.text_time(16))


WRONG = {
    "another prediction": ({}, {"prediction": "v"}, MismatchError, "--prediction v"),
    "a rank above the layers": ({}, {"rank": 9}, OptionError, "pass --rank 8 or less"),
    "a quantised base": (quantised, {}, RoleError, "load the teacher without quantisation"),
    "SDXL without added conditions": (without_added_conditions, {}, OptionError, "two text encoders"),
    "a consistency model": ({"time_cond_proj_dim": 8}, {}, RoleError, "distilled from as --teacher"),
    "a checkpoint that is not there": ({}, {"resume": "latest"}, OptionError, "omit --resume"),
    "a size that the VAE does not have": ({}, {"resolution": 15}, OptionError, "pass 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_combination_stops_before_the_first_step_with_the_cure(tmp_path, case, monkeypatch):
    make, more, kind, cure = WRONG[case]
    make(tmp_path / "t") if callable(make) else tiny_pipelines.save("sd15", tmp_path / "t", **make)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *args: pytest.fail("a step was taken"))
    with pytest.raises(kind, match=cure) as caught:
        train(options(str(tmp_path / "t"), tmp_path / "o", **more))
    assert isinstance(caught.value, DisbackError)


def test_a_lora_of_another_rank_is_refused_as_start_and_in_a_checkpoint(teachers, trained, tmp_path):
    with pytest.raises(OptionError, match="pass --rank 4"):
        Trainer(options(teachers["sd15"], tmp_path, student_lora=str(trained.output), rank=2))
    AcceleratorState._reset_state(True)
    with pytest.raises(DisbackError, match="shape"):
        train(options(teachers["sd15"], tmp_path, resume=str(trained.output / "checkpoint-2"), rank=2))


def test_a_recipe_says_all_three_or_none_of_them_is_given():
    least = ["--teacher", "t", "--prompts", "p", "--output", "o"]
    found = read([*least, "--recipe", "sdxl", "--gradient_checkpointing"])
    assert found.recording == {"record": 1000, "every": 100, "schedule": "sdxl"}
    assert found.gradient_checkpointing
    assert read(least) == Options(teacher="t", prompts="p", output="o")
    with pytest.raises(OptionError, match="--record"):
        read([*least, "--recipe", "sdxl", "--record", "5"])


def test_an_evaluation_that_is_not_known_or_leaves_no_prompt_stops_before_the_first_step(teachers, tmp_path):
    for more in ({"evaluate": "fid"}, {"evaluate": "frechet:"}, {"evaluate": "frechet:a", "evaluate_count": 1}):
        with pytest.raises(OptionError, match="TIMM_MODEL"):
            options(teachers["sd15"], tmp_path, **more)
    with pytest.raises(OptionError, match="3 of 3 prompts"):
        Trainer(options(teachers["sd15"], tmp_path, evaluate="frechet:resnet10t", evaluate_count=3))


def test_the_command_line_says_what_is_wrong_and_returns_2(teachers, tmp_path, capsys):
    from disback_adapters.lcm_lora.__main__ import main

    assert main([]) == 2
    assert "student --teacher" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    least = ["--teacher", teachers["sd15"], "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "o")]
    assert main(["student", *least, "--rank", "64"]) == 2
    assert "pass --rank 8" in capsys.readouterr().err
