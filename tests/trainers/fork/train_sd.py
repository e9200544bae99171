"""Stand-in of SYZhang0805/DisBack at d015b5e, main/train_sd.py, stage 2: its own swap reads keys that fit nothing."""

import json

import torch
from sd_trainer import Trainer, parse_args, write_down
from sd_unified_model import SDUniModel


class ForkTrainer(Trainer):
    def __init__(self, args, kind):
        super().__init__(args, kind)
        self.ckpt_num, self.swaps = args.start_target_num, []

    def before_step(self, index):  # main/train_sd.py:619-625, where it is in train()
        if index % self.args.interval == 0 and self.ckpt_num >= self.step:
            self.ckpt_num -= 100
            file = f"{self.args.trajectory_dir}/checkpoint_model_0{self.ckpt_num}/pytorch_model_1.bin"
            real_unet = self.model.guidance_model.module.real_unet
            before = {name: tensor.clone() for name, tensor in real_unet.state_dict().items()}
            found = real_unet.load_state_dict(torch.load(file, map_location="cpu"), strict=False)
            changed = sum(not torch.equal(tensor, before[name]) for name, tensor in real_unet.state_dict().items())
            self.swaps.append([len(before), changed, len(found.missing_keys), len(found.unexpected_keys)])


if __name__ == "__main__":
    trainer = ForkTrainer(parse_args(trajectory_dir=str, start_target_num=int, interval=int), SDUniModel)
    trainer.train()
    write_down(trainer)
    with open(f"{trainer.args.output_path}/swaps.json", "w") as f:
        json.dump(trainer.swaps, f)
