"""Stand-in of tianweiy/DMD2 at 8d8fa55, main/train_sd.py."""

from main.sd_unified_model import SDUniModel
from sd_trainer import Trainer, parse_args, write_down

if __name__ == "__main__":
    trainer = Trainer(parse_args(), SDUniModel)
    trainer.train()
    write_down(trainer)
