"""SiD's two losses (training/sid_loss.py:25-74): the generator's gradient flows through both networks."""

import torch


class SID_EDMLoss:  # noqa: N801
    def generator_loss(self, true_score, fake_score, images, alpha=1.2):
        sigma = torch.rand(len(images), 1) + 0.1
        noised = images + sigma * torch.randn_like(images)
        y_real, y_fake = true_score(noised, sigma), fake_score(noised, sigma)
        return (y_real - y_fake) * ((y_real - images) - alpha * (y_real - y_fake))

    def __call__(self, fake_score, images):
        sigma = (1.2 * torch.randn(len(images), 1) - 1.2).exp()
        return (fake_score(images + sigma * torch.randn_like(images), sigma) - images) ** 2
