"""`diffsynth/diffusion/logger.py:72-131`: checkpoints of the student alone, or of all networks without a prefix."""

import torch


class ModelLogger:
    def __init__(self, folder, remove_prefix_in_ckpt=None):
        self.folder, self.prefix, self.steps = folder, remove_prefix_in_ckpt, 0

    def on_step_end(self, accelerator, model, save_steps):
        self.steps += 1
        if save_steps is not None and self.steps % save_steps == 0:
            self.save_model(accelerator, model, f"step-{self.steps}.pt")

    def save_model(self, accelerator, model, name):
        accelerator.wait_for_everyone()
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            if self.prefix is not None:
                state = {k.removeprefix(self.prefix): v for k, v in state.items() if k.startswith(self.prefix)}
            torch.save({name: tensor.clone() for name, tensor in state.items()}, f"{self.folder}/{name}")
