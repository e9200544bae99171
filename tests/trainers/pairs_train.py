"""The script of the example package's trainer."""

import sys

from pairs.loop import training_loop

training_loop(sys.argv[1], shared="--shared" in sys.argv)
