"""The module that DMD2's main/train_sd.py:9 imports."""

from sd_trainer import UniModel


class SDUniModel(UniModel): ...
