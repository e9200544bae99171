"""Diff-Instruct's loop (training/di_training_loop.py:94-351): a snapshot holds the fake score as a whole module."""

import copy
import importlib
import pickle

import torch
from networks import Net


def training_loop(run_dir, rounds):
    torch.manual_seed(1)
    net = Net().eval().requires_grad_(False)  # :151
    Sg = copy.deepcopy(net).train().requires_grad_(True)  # :153
    G = copy.deepcopy(net).train().requires_grad_(True)  # :154
    loss_fn = importlib.import_module("training.di_loss").DI_EDMLoss()  # :167
    optimizer = torch.optim.Adam(Sg.parameters(), lr=1e-2, betas=(0.0, 0.999))  # :168
    g_optimizer = torch.optim.Adam(G.parameters(), lr=1e-2, betas=(0.0, 0.999))  # :169
    losses = []
    for done in range(rounds):
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            gen_images = G(2.5 * torch.randn(8, 2), torch.full((8, 1), 2.5))
        loss = loss_fn(net=Sg, images=gen_images).sum()  # :254
        loss.backward()
        losses.append(loss.item())
        optimizer.step()  # :267
        g_optimizer.zero_grad(set_to_none=True)
        gen_images = G(2.5 * torch.randn(8, 2), torch.full((8, 1), 2.5))
        loss = loss_fn.gloss(Sd=net, Sg=Sg, images=gen_images).sum()  # :281
        loss.backward()
        losses.append(loss.item())
        g_optimizer.step()  # :298
        if done == 0:  # :340-351
            with open(f"{run_dir}/network-snapshot.pkl", "wb") as f:
                pickle.dump({"Sg": copy.deepcopy(Sg)}, f)
    torch.save((net, Sg, G), f"{run_dir}/networks.pt")
    return losses
