"""Diff-Instruct's two losses (training/di_loss.py:35-68): the teacher is put into train mode and back."""

import torch


class DI_EDMLoss:  # noqa: N801
    def gloss(self, Sd, Sg, images):  # noqa: N803
        sigma = (1.2 * torch.randn(len(images), 1) - 1.2).exp()
        noised = images + sigma * torch.randn_like(images)
        Sg.train(), Sd.train()
        with torch.no_grad():
            D_real, D_fake = Sd(noised, sigma), Sg(noised, sigma)
        Sd.eval()
        return (D_fake - D_real) * images

    def __call__(self, net, images):
        sigma = (1.2 * torch.randn(len(images), 1) - 1.2).exp()
        return (net(images + sigma * torch.randn_like(images), sigma) - images) ** 2
