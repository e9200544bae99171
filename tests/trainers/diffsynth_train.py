"""Stand-in of `examples/flux2/model_training/special/dmd2/train.py`: one module with all networks in its pipe."""

import argparse
import copy
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from diffsynth.diffusion.dmd2 import DMD2Loss, launch_dmd2_training_task
from diffsynth.diffusion.logger import ModelLogger
from networks import Net
from torch import nn


def model_fn(pipe, dit, x, sigma, return_features=False):  # train.py:179, calls the parts of the network itself
    hidden = dit.inner[:2](torch.cat([x, sigma], dim=1))
    return hidden if return_features else dit.inner[2](hidden) * dit.resample_filter


class TrainingModule(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.pipe = nn.Module()
        self.pipe.dit = Net()
        self.pipe.dit_teacher = copy.deepcopy(self.pipe.dit).eval().requires_grad_(False)
        self.pipe.dit_fake_score = copy.deepcopy(self.pipe.dit)
        self.pipe.dmd2_discriminator = nn.Linear(8, 1) if options.gan else None
        if options.resume_from_checkpoint:
            self.load_state_dict(torch.load(options.resume_from_checkpoint))
        self.dmd2_student_model_name, self.dmd2_teacher_model_name = "dit", "dit_teacher"
        self.dmd2_fake_score_model_name, self.dmd2_discriminator_model_name = "dit_fake_score", "dmd2_discriminator"
        self.dmd2_model_fn_student = self.dmd2_model_fn_teacher = self.dmd2_model_fn_fake_score = model_fn
        self.dmd2_config = SimpleNamespace(student_update_freq=options.freq, gan_loss_weight=options.gan)
        self.loss = DMD2Loss(self.dmd2_config)

    def forward(self, data, iteration):
        return self.loss(self, data, iteration)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_path", required=True)
    parser.add_argument("--resume_from_checkpoint")
    parser.add_argument("--gan", type=float, default=0.0)
    parser.add_argument("--freq", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--save_steps", type=int)
    options = parser.parse_args()
    torch.manual_seed(1)
    module = TrainingModule(options)
    data = [torch.randn(8, 2) for _ in range(options.iterations)]
    launch_dmd2_training_task(
        Accelerator(cpu=True), data, module, ModelLogger(options.output_path), save_steps=options.save_steps
    )
    pipe = module.pipe
    torch.save((pipe.dit_teacher, pipe.dit_fake_score, pipe.dit), f"{options.output_path}/networks.pt")
    torch.save((module.loss.seen, "dmd2_model_fn_teacher" in vars(module), module.dmd2_model_fn_teacher is model_fn),
               f"{options.output_path}/seen.pt")  # fmt: skip
