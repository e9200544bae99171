"""Stand-in of mingyuanzhou/SiD at 01fbb13: the names and the order of calls of sid_train.py:253 and training/."""

import argparse
import json

from training import sid_training_loop as training_loop

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--outdir", required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--dump", type=int, default=10**9)
    parser.add_argument("--resume")
    parser.add_argument("--renamed", action="store_true")
    options = parser.parse_args()
    losses = training_loop.training_loop(options.outdir, options.rounds, options.dump, options.resume, options.renamed)
    with open(f"{options.outdir}/losses.json", "w") as f:
        json.dump(losses, f)
