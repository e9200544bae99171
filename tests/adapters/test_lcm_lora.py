"""The trainer of LCM-LoRA students, on tiny pipelines: recording, walk, resume, export, and inference in one step."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from disback_adapters.lcm_lora import training
from disback_adapters.lcm_lora.training import Trainer, teacher_samples
from lcm_students import PROMPTS, options, same, student_of, train
from safetensors.torch import load_file

import disback_plugin as disback
from disback_plugin import metrics
from disback_plugin.plugins.log_reader import read as read_log

INFERENCE = {
    "sd15": (LCMScheduler, {"timesteps": [999]}),
    "sdxl": (LCMScheduler, {"timesteps": [399]}),
    "sd3": (FlowMatchEulerDiscreteScheduler, {"num_inference_steps": 1}),
}
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("fresh")


def sampled(pipeline, output, kind, z):
    scheduler, steps = INFERENCE[kind]
    pipeline.scheduler = scheduler.from_pretrained(output, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(list(PROMPTS[:2]), latents=z.clone(), guidance_scale=1.0, output_type="latent", **steps).images


@pytest.mark.parametrize("kind", ["sd15", "sd3", pytest.param("sdxl", marks=slow)])
@pytest.mark.slow
def test_what_is_exported_samples_in_a_pipeline_what_the_trained_student_does(teachers, tmp_path, kind, request):
    trainer = request.getfixturevalue("trained") if kind == "sd15" else train(options(teachers[kind], tmp_path))
    path = disback.DegradationPath.from_pretrained(trainer.output / "path")
    assert len(path) == 3
    path.verify()
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline = DiffusionPipeline.from_pretrained(teachers[kind])
    untrained = sampled(pipeline, trainer.output, kind, z)
    pipeline.load_lora_weights(trainer.output)
    found = sampled(pipeline, trainer.output, kind, z)
    with torch.no_grad():
        assert torch.equal(found, trainer.student.generate(z, trainer.embeddings.rows([0, 1])))
    assert not torch.allclose(found, untrained, atol=1e-2)
    card = (trainer.output / "README.md").read_text()
    assert INFERENCE[kind][0].__name__ in card
    assert "guidance_scale=1.0" in card
    assert "load_lora_weights" in card
    assert next(iter(f"{name}={value}" for name, value in INFERENCE[kind][1].items())) in card


def test_a_resumed_run_ends_where_an_uninterrupted_one_does_bit_for_bit(teachers, trained, tmp_path):
    checkpoint = trained.output / "checkpoint-2"
    again = train(options(teachers["sd15"], tmp_path, path=str(trained.output / "path"), resume=str(checkpoint)))
    assert same(student_of(again), student_of(trained))


@slow
@pytest.mark.parametrize("more", [{"fake_score": "full"}, {"student": "full", "ema_decay": 0.5}])
def test_a_run_with_whole_networks_resumes_bit_for_bit_too(teachers, tmp_path, more):
    whole = train(options(teachers["sd15"], tmp_path, checkpoint_every=2, **more))
    again = train(options(teachers["sd15"], tmp_path, resume=str(tmp_path / "checkpoint-2"), **more))
    assert same(student_of(again), student_of(whole))
    with whole.averaged(), again.averaged():
        assert same(student_of(again), student_of(whole))


def test_the_latest_checkpoint_is_the_last_complete_one(teachers, trained, tmp_path, monkeypatch):
    shutil.copytree(trained.output, tmp_path / "o")
    again = Trainer(options(teachers["sd15"], tmp_path / "o", resume="latest"))
    assert again.checkpoint() == tmp_path / "o" / "checkpoint-4"
    monkeypatch.setattr(again.accelerator, "wait_for_everyone", lambda: pytest.fail("killed before the rename"))
    with pytest.raises(pytest.fail.Exception):
        again.save_checkpoint(6)
    assert again.checkpoint() == tmp_path / "o" / "checkpoint-4"


def test_one_network_is_held_and_its_own_weights_never_change(teachers, trained):
    roles = (trained.teacher, trained.fake_score, trained.student)
    assert len({id(role.network) for role in roles}) == 1
    unet = UNet2DConditionModel.from_pretrained(teachers["sd15"], subfolder="unet")
    assert disback.lora.base_checksum(trained.pipeline.unet) == disback.lora.base_checksum(unet)
    with torch.no_grad(), disback.lora.use_adapter(trained.pipeline.unet, None):
        arguments = torch.ones(1, 4, 8, 8), torch.tensor([500]), torch.ones(1, 3, 16)
        bare = trained.pipeline.unet(*arguments)[0]
        with disback.lora.use_adapter(trained.pipeline.unet, "teacher"):
            assert torch.equal(trained.pipeline.unet(*arguments)[0], bare), "the teacher is s'_0 again"


def test_the_generator_stands_still_while_recording_and_the_teacher_moves_after(teachers, tmp_path):
    trainer, seen = Trainer(options(teachers["sd15"], tmp_path)), []
    still, update = student_of(trainer), trainer.update_generator

    def watched():
        if not seen:
            assert same(student_of(trainer), still)
        seen.append(trainer.teacher.weights.checksum())
        return update()

    trainer.update_generator = watched
    trainer.run()
    assert len(seen) == 4
    assert len(set(seen)) == 2, "node 1 for two updates, then node 0"
    assert not same(student_of(trainer), still)


def test_without_recording_there_is_no_path(teachers, tmp_path):
    train(options(teachers["sd15"], tmp_path, record=0, every=None, schedule=None, steps=1))
    assert not (tmp_path / "path").exists()
    assert "without DisBack" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["diff_instruct", "vsd", "dmd"])
def test_the_largest_norm_of_a_gradient_follows_the_reduction_of_the_loss(teachers, tmp_path, monkeypatch, loss):
    trainer, norms = Trainer(options(teachers["sd15"], tmp_path, loss=loss, record=0)), []
    clip = trainer.accelerator.clip_grad_norm_
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda *a: norms.append(a[1]) or clip(*a))
    trainer.update_fake_score()
    trainer.update_generator()
    # The fake score's loss and DMD's are means over the 4 x 8 x 8 elements of a latent, the others are sums.
    assert norms == [10.0, 10.0 if loss == "dmd" else 10.0 * 4 * 8 * 8]


@slow
def test_gradient_checkpointing_changes_no_gradient_though_roles_are_switched_in_between(teachers, trained, tmp_path):
    checkpointed = train(options(teachers["sd15"], tmp_path, gradient_checkpointing=True))
    for name, weight in student_of(trained).items():
        torch.testing.assert_close(weight, student_of(checkpointed)[name], rtol=1e-4, atol=1e-5)


def test_grids_of_samples_go_to_folder_and_tracker_and_change_no_weight(teachers, trained, tmp_path):
    more = {"sample_every": 2, "report_to": "tensorboard", "sample_count": 2}
    shown = train(options(teachers["sd15"], tmp_path, **more))
    assert same(student_of(trained), student_of(shown))
    assert {file.name for file in (tmp_path / "samples").iterdir()} == {"000002.png", "000004.png"}
    (events,) = tmp_path.rglob("events.out*")
    written = events.read_bytes()
    assert b"samples" in written
    assert b"disback/position" in written


@slow
@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_a_student_is_followed_on_prompts_held_out_and_does_not_notice(teachers, tmp_path, monkeypatch, kind):
    plain, make, asked, found = metrics.features, training.frechet_distance, [], []
    monkeypatch.setattr(metrics, "features", lambda name, **more: plain(name, pretrained=False, **more))
    for name in ("seen", "unseen"):
        more = {"evaluate": "frechet:resnet10t", "evaluate_every": 2, "evaluate_count": 2, "ema_decay": 0.5}
        trainer = Trainer(options(teachers[kind], tmp_path / name, **more))
        rows = trainer.embeddings.rows
        monkeypatch.setattr(trainer.embeddings, "rows", lambda i, rows=rows: asked.extend(i) or rows(i))
        if name == "unseen":
            monkeypatch.setattr(training, "frechet_distance", lambda *args: make(*args) and (lambda: None))
            asked.clear()
        trainer.run()
        found.append(student_of(trainer))
        AcceleratorState._reset_state(True)
    assert same(*found)
    assert set(asked) == {0}, "of three prompts two are held out"
    curve = read_log(tmp_path / "seen" / "path.log.jsonl").curves()["distance_frechet"]
    assert [update for update, _ in curve] == [0, 2, 4]
    assert all(value > 0 for _, value in curve)
    assert len({value for _, value in curve}) == 3


@pytest.mark.parametrize("kind", ["sd15", "sd3"])
def test_the_teachers_own_samples_are_those_of_its_pipeline(teachers, tmp_path, kind):
    trainer = Trainer(options(teachers[kind], tmp_path, guidance=3.0))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = trainer.embeddings.rows([0, 1])
    with torch.no_grad():
        found = teacher_samples(trainer, z, conditions)
    pipeline = DiffusionPipeline.from_pretrained(teachers[kind])
    pipeline.set_progress_bar_config(disable=True)
    if kind == "sd15":
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    arguments = {"latents": z.clone(), "guidance_scale": 3.0, "output_type": "latent", "num_inference_steps": 25}
    expected = pipeline(list(PROMPTS[:2]), **arguments).images
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_in_bfloat16_the_frozen_weights_are_and_the_trained_are_not(teachers, tmp_path):
    trainer = train(options(teachers["sd15"], tmp_path, mixed_precision="bf16", steps=1))
    optimizers = (trainer.optimizer, trainer.fake_score_optimizer)
    optimized = {id(weight) for optimizer in optimizers for weight in optimizer.param_groups[0]["params"]}
    named = trainer.pipeline.unet.named_parameters()
    kinds = {(id(p) in optimized, p.dtype) for n, p in named if ".teacher." not in n}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_whole_student_is_exported_as_a_network(teachers, tmp_path):
    trainer = train(options(teachers["sd15"], tmp_path, student="full", steps=1, learning_rate=1e-3))
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = sampled(DiffusionPipeline.from_pretrained(teachers["sd15"], unet=unet), tmp_path, "sd15", z)
    with torch.no_grad():
        assert torch.equal(found, trainer.student.generate(z, trainer.embeddings.rows([0, 1])))
    assert "unet = UNet2DConditionModel.from_pretrained" in (tmp_path / "README.md").read_text()


def test_training_goes_on_from_a_lora_that_is_given(teachers, trained, tmp_path):
    second = Trainer(options(teachers["sd15"], tmp_path, student_lora=str(trained.output)))
    assert same(student_of(second), student_of(trained))


def test_only_weights_scheduler_and_card_are_published(trained, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    sent = []

    class Hub:
        def create_repo(self, name, exist_ok):
            return type("Url", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, **what):
            sent.append(what)

    monkeypatch.setattr(training, "HfApi", Hub)
    monkeypatch.setattr(trained, "options", dataclasses.replace(trained.options, push_to_hub=True))
    trained.export()
    (what,) = sent
    files = [str(file.relative_to(trained.output)) for file in trained.output.rglob("*") if file.is_file()]
    assert what["repo_id"] == f"me/{trained.output.name}"
    assert set(filter_repo_objects(files, allow_patterns=what["allow_patterns"])) == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "scheduler/scheduler_config.json",
    }


# -- processes --------------------------------------------------------------------------------------------------------


SCRIPT = """
import sys
from disback_adapters.lcm_lora.roles import read
from disback_adapters.lcm_lora.training import Trainer
trainer = Trainer(read(sys.argv[1:]))
trainer.run()
sys.stdout.write(f"weights {trainer.student.weights.checksum()}\\n")
"""


@slow
def test_two_processes_draw_each_their_own_and_end_with_the_same_student(teachers, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = [tmp_path / "script.py", "--teacher", teachers["sd15"], "--output", tmp_path / "o"]
    more = ["--rank=4", "--steps=3", "--record=2", "--every=1", "--schedule=ramp:2", "--checkpoint_every=3"]
    command = [*launch, *run, "--prompts", tmp_path / "prompts.txt", *more]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(ends) == 2
    assert len(set(ends)) == 1, "gradients are averaged"
    first, second = ((tmp_path / "o" / "checkpoint-3" / f"random_states_{rank}.pkl").read_bytes() for rank in (0, 1))
    assert first != second
    weights = load_file(tmp_path / "o" / "pytorch_lora_weights.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
