"""Stand-in of pkulwj1994/diff_instruct at 0c37389: the names and the order of calls of di_train.py and training/."""

import argparse
import json

from training import di_training_loop as training_loop

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--outdir", required=True)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    losses = training_loop.training_loop(options.outdir, options.rounds)
    with open(f"{options.outdir}/losses.json", "w") as f:
        json.dump(losses, f)
