"""Stand-in of guandeh17/Self-Forcing at 33593df: train.py, whose `main` holds the trainer."""

import argparse

from trainer.distillation import Trainer as ScoreDistillationTrainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--logdir", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--log_iters", type=int, default=10**9)
    parser.add_argument("--generator_ckpt")
    parser.add_argument("--real_width", type=int, default=8)
    trainer = ScoreDistillationTrainer(parser.parse_args())
    trainer.train()


if __name__ == "__main__":
    main()
