"""Stand-in of hao-ai-lab/FastVideo at 2f3d407: the order of calls of train/trainer.py:96-234 and of DMD2Method.

Its checkpoint is torch's own, of both optimizers and of the callbacks' states (train/utils/checkpoint.py:215-258).
"""

from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp
from networks import Net
from torch.distributed.checkpoint import state_dict as of

callbacks = ModuleType("fastvideo.train.callbacks.callback")


class Callback:
    """train/callbacks/callback.py:34-103, what is called of it."""

    def on_validation_begin(self, method, iteration=0): ...

    def on_train_end(self, method, iteration=0): ...

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict): ...


callbacks.Callback = Callback


class DMD2Method:
    def __init__(self, interval=2, critic=True):
        torch.manual_seed(1)
        self.role_modules, self.interval = {}, interval
        self.student, self.teacher = (SimpleNamespace(transformer=Net()) for _ in range(2))
        self.teacher.transformer.requires_grad_(False)
        self._student_optimizer = torch.optim.AdamW(self.student.transformer.parameters(), lr=1e-2)
        self._student_lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._student_optimizer, lambda step: min(1.0, step / 4)
        )
        if critic:
            self.critic = SimpleNamespace(transformer=Net())
            self._critic_optimizer = torch.optim.AdamW(self.critic.transformer.parameters(), lr=1e-2)

    def step(self, iteration):  # dmd2.py:84-190: both backwards, then the critic's step and the student's
        update = iteration % self.interval == 0
        sigma = torch.rand(8, 1) + 0.1
        x = self.student.transformer(torch.randn(8, 2), torch.ones(8, 1))
        x_t = (x + sigma * torch.randn_like(x)).detach()
        if update:
            with torch.no_grad():
                gradient = self.critic.transformer(x_t, sigma) - self.teacher.transformer(x_t, sigma)
            (gradient * x).mean().backward()
        (self.critic.transformer(x_t, sigma) - x.detach()).square().mean().backward()
        optimizers = [self._critic_optimizer] + [self._student_optimizer] * update
        for optimizer in optimizers:
            optimizer.step()
        if update:
            self._student_lr_scheduler.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    def checkpoint(self):
        state = {"scheduler": self._student_lr_scheduler.state_dict(), "random": torch.get_rng_state()}
        pairs = {"student": self._student_optimizer, "critic": self._critic_optimizer}
        for role, optimizer in pairs.items():
            network = getattr(self, role).transformer
            state[f"roles.{role}"] = of.get_model_state_dict(network)
            state[f"optimizers.{role}"] = of.get_optimizer_state_dict(network, optimizer)
        return state

    def load(self, state):
        for role in ("student", "critic"):
            network, optimizer = getattr(self, role).transformer, getattr(self, f"_{role}_optimizer")
            of.set_model_state_dict(network, state[f"roles.{role}"])
            of.set_optimizer_state_dict(network, optimizer, state[f"optimizers.{role}"])
        self._student_lr_scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])


class Trainer:
    def __init__(self, callback, folder):
        self.callback, self.folder = callback, Path(folder)

    def run(self, method, steps, save_at=()):
        start = max((int(file.name) for file in self.folder.glob("*")), default=0)
        if start:
            state = {**method.checkpoint(), "callbacks": self.callback.state_dict()}
            dcp.load(state, checkpoint_id=self.folder / str(start))
            self.callback.load_state_dict(state["callbacks"])  # before the networks: by name
            method.load(state)
        self.callback.on_validation_begin(method, iteration=start)
        for iteration in range(start + 1, steps + 1):
            method.step(iteration)
            if iteration in save_at:
                state = {**method.checkpoint(), "callbacks": self.callback.state_dict()}
                dcp.save(state, checkpoint_id=self.folder / str(iteration))
            self.callback.on_validation_begin(method, iteration=iteration)
        self.callback.on_train_end(method, iteration=steps)
