"""LightX2V's checkpoint (lightx2v_train/trainers/dmd/checkpoint.py:365): both networks, their optimizers and rates."""

import torch


class DmdCheckpointManager:
    def __init__(self, owner):
        self.owner = owner

    def parts(self):
        own = self.owner
        roles = (own.model, own.optimizer, own.lr_scheduler), (own.fake_model, own.fake_optimizer)
        return [part.denoiser_module() if hasattr(part, "denoiser_module") else part for role in roles for part in role]

    def save_checkpoint(self, iteration, save_total_limit):
        state = {"iteration": iteration, "rng": torch.get_rng_state(), "parts": [p.state_dict() for p in self.parts()]}
        torch.save(state, f"{self.owner.folder}/checkpoint.pt")

    def load(self, file):
        state = torch.load(file, weights_only=False)
        for part, saved in zip(self.parts(), state["parts"], strict=True):
            part.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        return state["iteration"]
