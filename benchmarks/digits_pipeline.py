"""Train a small text-to-image teacher on scikit-learn's digits, with prompts such as "the digit seven".

The teacher is a Stable Diffusion pipeline in all but size: its latents are the 8x8 pixels, so that its VAE, which
diffusers requires, is never used. Text encoder and UNet are trained together, on one core in two to three minutes.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"the digit {name}" for name in NAMES]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def digits():
    """Return images in [-1, 1], shape (1797, 1, 8, 8), and their classes, shape (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(data.target)


def tokenizer(length):
    """Return CLIP's tokenizer with a vocabulary of letters."""
    names = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    with TemporaryDirectory() as folder:  # from files, as every version of transformers takes it
        Path(folder, "vocab.json").write_text(json.dumps({name: at for at, name in enumerate(names)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def text_config(words, width, layers):
    """Return the configuration of a text encoder for this tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def scheduler(**more):
    """Return Stable Diffusion's scheduler."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, steps_offset=1, **more)


def untrained():
    words = tokenizer(20)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(latent_channels=1, block_out_channels=(8,), norm_num_groups=2),
        text_encoder=CLIPTextModel(text_config(words, width=32, layers=1)),
        tokenizer=words,
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
        ),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_teacher(folder, *, steps=4_000, batch=64, seed=0):
    """Train a pipeline and save it."""
    torch.manual_seed(seed)
    pipeline, (images, classes) = untrained(), digits()
    unet, text_encoder = pipeline.unet.train(), pipeline.text_encoder.train()
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    words = pipeline.tokenizer([*PROMPTS, ""], padding="max_length", max_length=20, return_tensors="pt").input_ids
    for _ in range(steps):
        rows = torch.randint(len(images), (batch,))
        labels = torch.where(torch.rand(batch) < 0.1, len(NAMES), classes[rows])  # no prompt, for guidance
        x_0, eps, t = images[rows], torch.randn(batch, 1, 8, 8), torch.randint(1_000, (batch,))
        text = text_encoder(words)[0][labels]
        output = unet(pipeline.scheduler.add_noise(x_0, eps, t), t, text, return_dict=False)[0]
        optimizer.zero_grad()
        nn.functional.mse_loss(output, eps).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()
    unet.eval(), text_encoder.eval()
    pipeline.save_pretrained(folder)


def classifier():
    """Return a function from images, shape (B, 1, 8, 8), to their classes, and its accuracy on images held out."""
    from sklearn.svm import SVC

    images, classes = digits()
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    learned, kept = rows[:1_200], rows[1_200:]
    flat = ((images.flatten(1) + 1) / 2).numpy()
    model = SVC(gamma=0.25).fit(flat[learned], classes[learned])

    def answer(x):
        return torch.from_numpy(model.predict(((x.clamp(-1, 1).flatten(1) + 1) / 2).numpy()))

    return answer, (answer(images[kept]) == classes[kept]).double().mean().item()
