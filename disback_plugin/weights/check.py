"""Whether a state fits a network: keys, shapes, dtype classes, and tied weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from disback_plugin.errors import MismatchError
from disback_plugin.weights.tensor_meta import TensorMeta, dtype_class

__all__ = ["check", "ties", "two_values"]


def ties(live: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {name: first name of the same tensor} of every other name of a tied weight."""
    first: dict[int, str] = {}
    firsts = {name: first.setdefault(id(tensor), name) for name, tensor in live.items()}
    return {name: twin for name, twin in firsts.items() if name != twin}


def two_values(twin: str, name: str, role: str) -> MismatchError:
    """Return the error for tied weights that were given two values."""
    return MismatchError(
        f"two values for the tied weights {twin!r} and {name!r} of the {role}",
        expected="one",
        cure="write a state of a network that ties the same weights",
    )


def check(given: Mapping[str, TensorMeta], live: Mapping[str, TensorMeta], role: str, source: str) -> None:
    """Raise MismatchError unless something given has the keys, the shapes and the dtype classes of `live`."""
    missing, unknown = sorted(live.keys() - given.keys()), sorted(given.keys() - live.keys())
    if missing or unknown:
        raise MismatchError(
            f"{source} without {len(missing)} keys {missing[:3]} and with {len(unknown)} unknown {unknown[:3]}",
            expected=f"the {len(live)} keys of the {role}, no more and no less",
            cure="use two networks of one architecture (added heads must not be in the role), or of LoRA two adapters "
            "of one base: lora.add_teacher(model, like=...)",
        )
    for name, own in live.items():
        if given[name].shape != own.shape:
            raise MismatchError(
                f"{name} of shape {tuple(given[name].shape)} in {source}",
                expected=f"{tuple(own.shape)} as in the {role}",
                cure="use two networks of one configuration; of LoRA, one rank: lora.add_teacher(model, like=...)",
            )
        if dtype_class(given[name].dtype) != dtype_class(own.dtype):
            raise MismatchError(
                f"{name} of {given[name].dtype} in {source}",
                expected=f"a dtype like {own.dtype} of the {role}",
                cure="use weights of the same class of dtype",
            )
