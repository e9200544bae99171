"""SiD's loop (training/sid_training_loop.py:117-415): all is in local variables; the fake score's turn is first."""

import copy
import importlib

import torch
from networks import Net


def save_pt(pt, fname):  # :102
    torch.save(pt, fname)


def training_loop(run_dir, rounds, dump, resume, renamed=False):
    torch.manual_seed(1)
    true_score = Net().eval().requires_grad_(False)  # :177
    fake_score = copy.deepcopy(true_score).train().requires_grad_(True)  # :181
    G = copy.deepcopy(true_score).train().requires_grad_(True)  # :184
    # :195, by class name
    loss_fn = importlib.import_module("training.sid_loss").SID_EDMLoss()
    fake_score_optimizer = torch.optim.Adam(fake_score.parameters(), lr=1e-2, betas=(0.0, 0.999))  # :196
    g_optimizer = torch.optim.Adam(G.parameters(), lr=1e-2, betas=(0.0, 0.999))  # :197
    done = 0
    if resume:  # :213-223
        data = torch.load(resume, weights_only=False)
        fake_score.load_state_dict(data["fake_score"].state_dict())
        G.load_state_dict(data["G"].state_dict())
        fake_score_optimizer.load_state_dict(data["fake_score_optimizer_state"])
        g_optimizer.load_state_dict(data["g_optimizer_state"])
        done = data["rounds"]
        torch.set_rng_state(data["rng"])
    if renamed:  # a later version, whose teacher goes by another name
        teacher, true_score = true_score, None
        del true_score
    else:
        teacher = true_score
    losses = []
    while done < rounds:
        fake_score.train().requires_grad_(True)
        fake_score_optimizer.zero_grad(set_to_none=True)
        images = G(2.5 * torch.randn(8, 2), torch.full((8, 1), 2.5))
        loss = loss_fn(fake_score=fake_score, images=images).sum()  # :305
        loss.backward()
        losses.append(loss.item())
        fake_score.eval().requires_grad_(False)  # :311
        fake_score_optimizer.step()  # :317
        G.train().requires_grad_(True)
        g_optimizer.zero_grad(set_to_none=True)
        images = G(2.5 * torch.randn(8, 2), torch.full((8, 1), 2.5))
        loss = loss_fn.generator_loss(true_score=teacher, fake_score=fake_score, images=images).sum()  # :331
        loss.backward()
        losses.append(loss.item())
        G.eval().requires_grad_(False)  # :337
        g_optimizer.step()  # :343
        done += 1
        if done % dump == 0:  # :415
            save_pt(
                pt=dict(  # noqa: C408
                    fake_score=fake_score,
                    G=G,
                    fake_score_optimizer_state=fake_score_optimizer.state_dict(),
                    g_optimizer_state=g_optimizer.state_dict(),
                    rounds=done,
                    rng=torch.get_rng_state(),
                ),
                fname=f"{run_dir}/training-state-{done:06d}.pt",
            )
    torch.save((teacher, fake_score, G), f"{run_dir}/networks.pt")
    return losses
