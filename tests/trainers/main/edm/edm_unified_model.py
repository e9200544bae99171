"""DMD2's two networks in one (main/edm/edm_unified_model.py, edm_guidance.py:27-35)."""

import copy

import torch
from networks import Net
from torch import nn


class EDMGuidance(nn.Module):
    def __init__(self):
        super().__init__()
        self.real_unet = Net().requires_grad_(False)
        self.fake_unet = copy.deepcopy(self.real_unet).requires_grad_(True)
        self.cls_pred_branch = nn.Linear(2, 1)  # the discriminator's head

    def forward(self, image, generator_turn):
        sigma = torch.rand(len(image), 1) + 0.1
        if not generator_turn:
            loss = (self.fake_unet(image + sigma * torch.randn_like(image), sigma) - image).square().mean()
            return loss + self.cls_pred_branch(image).square().mean()
        noised = (image + sigma * torch.randn_like(image)).detach()
        with torch.no_grad():
            p_real, p_fake = self.real_unet(noised, sigma), self.fake_unet(noised, sigma)
        return ((p_fake - p_real) * image).mean()


class EDMUniModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.guidance_model = EDMGuidance()
        self.feedforward_model = copy.deepcopy(self.guidance_model.fake_unet)

    def forward(self, noise, compute_generator_gradient=False, generator_turn=False, image=None):
        if not generator_turn:
            return self.guidance_model(image, generator_turn=False)
        image = self.feedforward_model(80 * noise, torch.full((len(noise), 1), 80.0))
        if not compute_generator_gradient:
            return None, image.detach()
        self.guidance_model.requires_grad_(False)  # :48
        loss = self.guidance_model(image, generator_turn=True)
        self.guidance_model.requires_grad_(True)  # :54: the teacher's too
        return loss, image.detach()
