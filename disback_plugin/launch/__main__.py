"""Run `disback run` as a module, which torchrun and accelerate launch need: `torchrun -m disback_plugin.launch ...`."""

import sys

from disback_plugin.cli import main

raise SystemExit(main(["run", *sys.argv[1:]]))
