"""The module that the fork's main/train_sd.py:9 imports: no package, for the script lies beside it."""

from sd_trainer import UniModel


class SDUniModel(UniModel): ...
