"""The loop of the example package's trainer."""

import torch
from networks import Net

from pairs.loss import Loss


def save_checkpoint(path, **networks):
    torch.save({name: network.state_dict() for name, network in networks.items()}, path)


def training_loop(outdir, shared):
    torch.manual_seed(1)
    true_score, generator = Net().requires_grad_(False), Net()
    fake_score = true_score if shared else Net()
    fake_score_optimizer = torch.optim.Adam(fake_score.parameters(), lr=1e-2)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    loss_fn = Loss()
    for _ in range(12):
        image = generator(80 * torch.randn(8, 2), torch.full((8, 1), 80.0))
        fake_score_optimizer.zero_grad()
        loss_fn(fake_score, image.detach()).backward()
        fake_score_optimizer.step()
        g_optimizer.zero_grad()
        sigma = torch.rand(8, 1) + 0.1
        noised = (image + sigma * torch.randn_like(image)).detach()
        with torch.no_grad():
            difference = fake_score(noised, sigma) - true_score(noised, sigma)
        (difference * image).mean().backward()
        g_optimizer.step()
    save_checkpoint(f"{outdir}/checkpoint.pt", true_score=true_score, fake_score=fake_score)
