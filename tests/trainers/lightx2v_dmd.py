"""Stand-in of ModelTC/LightX2V at f8aee98: the names and the order of calls of train.py and its DMD trainer."""

import argparse
import json

import torch
from lightx2v_train.trainers.dmd.trainer import DmdTrainer

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--resume")
    parser.add_argument("--save_at", type=int, default=0)
    parser.add_argument("--ida", action="store_true")
    options = parser.parse_args()
    trainer = DmdTrainer(options.output_dir, options.iterations, options.resume, options.save_at, options.ida)
    trainer.train()
    with open(f"{options.output_dir}/losses.json", "w") as f:
        json.dump(trainer.losses, f)
    roles = trainer.teacher_model, trainer.fake_model, trainer.model
    torch.save([role.denoiser_module() for role in roles], f"{options.output_dir}/networks.pt")
