"""The flags of the published trainers' scripts, with their types, to parse a command as they would.

| script                                     | repository at commit               | where                            |
|--------------------------------------------|------------------------------------|----------------------------------|
| di_train.py                                | pkulwj1994/diff_instruct 0c37389   | di_train.py:59-110 (click)       |
| sid_train.py, sid_metrics.py               | mingyuanzhou/SiD 01fbb13           | sid_train.py:52-105 (click)      |
| main/train_sd.py, main/test_folder_sd.py,  | tianweiy/DMD2 8d8fa55              | main/train_sd.py:616-682,        |
| main/sdxl/test_folder_sdxl.py              |                                    | main/test_folder_sd.py:165-187   |
"""

from __future__ import annotations

import argparse


def truth(text: str) -> bool:
    """Read a boolean as click does."""
    return {"0": False, "1": True, "false": False, "true": True}[text.lower()]


def channels(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


# What both EDM trainers have: SiD's are made from Diff-Instruct's.
EDM = {
    str: "outdir data desc transfer resume metrics edm_model arch precond",
    truth: "cond xflip fp16 bench cache",
    int: "batch batch-gpu cbase workers tick snap seed",
    float: "duration lr glr ema dropout augment ls init_sigma",
    channels: "cres",
    None: "nosubdir dry-run",
}
WANDB = "wandb_entity wandb_project wandb_name"
FLAGS = {
    "di_train.py": [EDM, {float: "ema_mu sgls", int: "lr_warmup_kimg"}],
    "sid_train.py": [EDM, {str: "data_stat", int: "dump tmax", float: "lsg alpha g_beta1"}],
    "sid_metrics.py": [{str: "data data_stat metrics network outdir", truth: "cond", float: "init_sigma"}],
    "main/train_sd.py": [
        {
            str: f"model_id output_path log_path checkpoint_path ckpt_only_path train_prompt_path cache_dir"
            f" revision generator_ckpt_path real_image_path {WANDB}",
            int: "train_iters log_iters batch_size seed resolution local_rank wandb_iters warmup_step max_checkpoint"
            " gradient_accumulation_steps num_train_timesteps latent_resolution grid_size num_workers latent_channel"
            " dfake_gen_update_ratio conditioning_timestep denoising_timestep num_denoising_step lora_rank"
            " diffusion_gan_max_timestep",
            float: "lr max_grad_norm min_step_percent max_step_percent real_guidance_scale fake_guidance_scale"
            " lora_alpha generator_lr guidance_lr gen_cls_loss_weight guidance_cls_loss_weight dm_loss_weight"
            " lora_dropout denoising_loss_weight",
            None: "initialie_generator use_fp16 no_save log_loss cls_on_clean_image gen_cls_loss sdxl fsdp tiny_vae"
            " gradient_checkpointing denoising diffusion_gan gan_alone backward_simulation generator_lora",
        }
    ],
    "main/test_folder_sd.py": [
        {
            str: f"folder anno_path ref_dir model_id {WANDB}",
            int: "eval_batch_size latent_resolution image_resolution num_train_timesteps test_visual_batch_size seed"
            " per_image_object eval_res total_eval_samples num_inference_steps",
            float: "guidance_scale",
            None: "pred_eps skip_eval clip_score sd_teacher sde",
        }
    ],
    "main/sdxl/test_folder_sdxl.py": [
        {
            str: f"folder ref_dir anno_path model_id revision checkpoint_path result_path {WANDB}",
            int: "latent_resolution image_resolution num_train_timesteps seed eval_batch_size conditioning_timestep"
            " eval_res total_eval_samples per_image_object test_visual_batch_size num_step lora_rank",
            float: "guidance_scale lora_alpha lora_dropout",
            None: "predict_x0 sdxl_lightning_4step sdxl_lightning_1step clip_score sdxl_teacher lcm_1step lcm_4step"
            " turbo_1step turbo_4step image_reward pick_score generator_lora",
        }
    ],
}


def parse(script: str, arguments: list[str]) -> dict[str, object]:
    """Return the values of a published script's command; SystemExit if it would refuse the command."""
    parser = argparse.ArgumentParser(script, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for table in FLAGS[script]:
        for kind, names in table.items():
            for name in names.split():
                how = {"action": "store_true"} if kind is None else {"type": kind}
                parser.add_argument(f"--{name}", **how)
    return vars(parser.parse_args(arguments))
