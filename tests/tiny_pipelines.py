"""Tiny text-to-image pipelines built from configurations: random weights, a vocabulary of letters, no download."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from digits_pipeline import LETTERS, scheduler, text_config, tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast


def words():
    return tokenizer(24)


def text_encoder(kind=CLIPTextModel):
    return kind(text_config(words(), width=16, layers=2)).eval()


def t5():
    names = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    unigrams = Tokenizer(Unigram([(name, -1.0) for name in names], unk_id=2))
    unigrams.pre_tokenizer, unigrams.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigrams.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    spelt = T5TokenizerFast(tokenizer_object=unigrams, extra_ids=0, model_max_length=24)
    sizes = T5Config(vocab_size=len(names), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {"text_encoder_3": T5EncoderModel(sizes).eval(), "tokenizer_3": spelt}


def vae(**more):
    return AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        sample_size=16,
        **more,
    )


def unet(width, **more):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        **more,
    )


def text_time(width):
    """What a UNet of SDXL's kind is told beside the prompt: a pooled text embedding of this width, and six sizes."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": width + 6 * 4,
    }


def sd15(prediction_type="epsilon", **more):
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=words(),
        unet=unet(16, **more),
        scheduler=scheduler(prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl():
    torch.manual_seed(0)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        tokenizer=words(),
        tokenizer_2=words(),
        unet=unet(32, **text_time(16)),
        scheduler=scheduler(),
    )


def sd3():
    torch.manual_seed(0)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.0),
        text_encoder=text_encoder(CLIPTextModelWithProjection),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        tokenizer=words(),
        tokenizer_2=words(),
        **t5(),
    )


KINDS = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3}


def save(kind, folder, **more):
    """Save a tiny pipeline, as `DiffusionPipeline.from_pretrained` loads it; return the folder."""
    KINDS[kind](**more).save_pretrained(folder)
    return folder
