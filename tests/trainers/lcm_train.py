"""Stand-in of diffusers' train_lcm_distill_lora_sd_wds.py at 58eb52c: the names and the order of calls."""

import argparse
import copy
import json

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model


def main(args):
    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True)
    noise_scheduler = DDPMScheduler()  # :928
    teacher_unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=4,
    )  # :961
    teacher_unet.requires_grad_(False)  # :968
    unet = copy.deepcopy(teacher_unet).train()  # :971
    unet = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"]))  # :1013
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)  # :1108
    lr_scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)  # :1171
    alphas, losses = noise_scheduler.alphas_cumprod, []
    for _ in range(args.max_train_steps):
        with accelerator.accumulate(unet):
            latents, prompt_embeds = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 4)
            start = torch.randint(20, 1000, (2,))
            noisy = noise_scheduler.add_noise(latents, torch.randn_like(latents), start)
            noise_pred = unet(noisy, start, encoder_hidden_states=prompt_embeds, added_cond_kwargs={}).sample  # :1287
            with torch.no_grad():  # :1313-1368
                eps = teacher_unet(noisy, start, encoder_hidden_states=prompt_embeds).sample
                alpha, sigma = (value.view(2, 1, 1, 1) for value in (alphas[start].sqrt(), (1 - alphas[start]).sqrt()))
                x_prev = noise_scheduler.add_noise((noisy - sigma * eps) / alpha, eps, start - 20)
                target = unet(x_prev, start - 20, encoder_hidden_states=prompt_embeds).sample  # :1371
            loss = torch.nn.functional.mse_loss(noise_pred, target)
            accelerator.backward(loss)  # :1399
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    weights = {"teacher": teacher_unet.state_dict(), "student": accelerator.unwrap_model(unet).state_dict()}
    torch.save(weights, f"{args.output_path}/networks.pt")
    with open(f"{args.output_path}/losses.json", "w") as f:
        json.dump(losses, f)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_path", required=True)
    parser.add_argument("--max_train_steps", type=int, default=8)
    main(parser.parse_args())
