"""Teacher and fake score as two LoRA adapters of peft on one base network, which is never written.

s_phi is base + adapter, and so is the teacher: a second, frozen adapter of the same kind, whose B is 0 at node 0, where
its outputs are the base's own. A node is then the tensors A and B of an adapter, tens of megabytes, and a move writes
them into the teacher's, in place. Nothing else in the house knows of adapters.

A position between two nodes interpolates A and B. The weights B A that come of it differ from interpolated ones by
t (1 - t) (B' - B)(A' - A), for A, B and A', B' of the two nodes: nothing at a node, and of second order between them.

`disback_plugin.weights.lora` needs the extra `lora`; peft is imported where it is called.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from disback_plugin.errors import MismatchError, RoleError
from disback_plugin.weights.checksum import checksum
from disback_plugin.weights.fsdp1 import flattened
from disback_plugin.weights.peft_layers import (
    MATRICES,
    active,
    activity,
    adapter_tensors,
    base_parameters,
    named_layers,
    restore,
)
from disback_plugin.weights.sharding import is_sharded
from disback_plugin.weights.tensors import unwrap

__all__ = ["add_teacher", "base_checksum", "under"]


def add_teacher(model: nn.Module, *, like: str, name: str = "teacher") -> None:
    """Add the teacher as a frozen adapter that changes no output, until a node is written into it.

    Its A is the same in every process and on every machine (drawn by peft from a seed of its own), and s_phi's is set
    to it at the start of a recording, so that a path fits every run on the same base. It has no dropout. Which adapter
    is active and what requires gradients stays as it is, and the global random state does too.

    Args:
        model: A `PeftModel`, or a model of diffusers, transformers or torch with adapters injected; plain or wrapped.
        like: Name of the fake score's adapter, whose targets, rank and scale it takes.
        name: Its own name.

    Raises:
        RoleError: If there is no adapter `like`, it is no plain LoRA, or the name is taken.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]), "fake")
        >>> add_teacher(net, like="fake")
        >>> x = torch.ones(1, 2)
        >>> with under(net, "teacher"):
        ...     before = net(x)
        >>> with under(net, None):
        ...     torch.equal(net(x), before)
        True
    """
    import peft

    root: Any = unwrap(model, adapted=True)
    _found(root, like, "fake score")
    if name in root.peft_config:
        raise RoleError(
            f"an adapter {name!r} that is there already", expected="a new name", cure="pass another name=, or use it"
        )
    config = copy.deepcopy(root.peft_config[like])
    config.lora_dropout, config.inference_mode = 0.0, True
    if config.init_lora_weights is False:
        config.init_lora_weights = True
    before = activity(root)
    flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.default_generator.manual_seed(0)
        if isinstance(root, peft.PeftModel):
            root.add_adapter(name, config)
        else:
            peft.inject_adapter_in_model(config, root, adapter_name=name)
    for _, tensor in adapter_tensors(root, name, "teacher"):
        tensor.requires_grad_(False)
    restore(before)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


@contextmanager
def under(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Run a network under one of its adapters, and go back to what was active before.

    What requires gradients is the same inside and after, which peft's own `set_adapter` would change; a compiled
    network has a graph for each adapter, made at its first use. Under activation checkpointing the backward runs the
    forward again: call `backward()` inside too.

    Args:
        model: The network, plain or wrapped.
        adapter: The adapter's name; None for the bare base.

    Raises:
        RoleError: If there is no such adapter.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
        >>> net, x = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config, "fake"), torch.ones(1, 2)
        >>> with under(net, None):
        ...     bare = net(x)
        >>> torch.equal(net(x), bare), net.active_adapter
        (False, 'fake')
    """
    root = unwrap(model)
    before = activity(root)
    if adapter is not None and not any(adapter in getattr(layer, "r", ()) for layer, _, _ in before):
        _found(root, adapter, "network")  # raises
    try:
        restore([(layer, names if adapter is None else [adapter], adapter is None) for layer, names, _ in before])
        if active(root) != ([] if adapter is None else [adapter]):
            raise RoleError(
                "a version of peft whose layers do not keep their active adapter in _active_adapter",
                expected="peft 0.13 to 0.21",
                cure="install such a version",
            )
        yield
    finally:
        restore(before)


def base_checksum(model: nn.Module) -> str:
    """Return the checksum of all parameters but those of adapters, under the names they have without adapters.

    Args:
        model: A network, with or without adapters.

    Example:
        >>> base_checksum(nn.Linear(2, 2)) == base_checksum(nn.Linear(2, 2))
        False
    """
    state = dict(base_parameters(model))
    odd = next((name for name, p in state.items() if p.is_meta or is_sharded(p) or flattened(p)), None)
    if odd is not None:
        raise RoleError(
            f"{odd} of the base, which is sharded or on the meta device",
            expected="a base that is whole on each process, as it is frozen",
            cure="wrap the network in DDP, or not at all, and load its weights first",
        )
    return checksum({name: parameter.detach() for name, parameter in state.items()})


# -- what an adapter role is, and is not ------------------------------------------------------------------------------


def identity(root: nn.Module, adapter: str, role: str) -> str:
    """Return a digest of what an adapter works on: the base's weights, and the scale of each of its layers.

    Raises:
        RoleError: If there is no such adapter, or one whose nodes would not be all that changes: see the cure.
    """
    scales = [(name, layer.scaling[adapter]) for name, layer in _found(root, adapter, role)]
    return sha256(repr((base_checksum(root), scales)).encode()).hexdigest()[:32]


def _found(root: nn.Module, adapter: str, role: str) -> list[tuple[str, Any]]:
    """Return the layers that have an adapter, after a check that its matrices are all that it is."""
    loras = [(name, layer) for name, layer in named_layers(root) if MATRICES[0] in layer.adapter_layer_names]
    found = [(name, layer) for name, layer in loras if adapter in layer.r]
    if not found:
        names = sorted({name for _, layer in loras for name in layer.r})
        raise RoleError(
            f"no LoRA adapter {adapter!r} in {type(root).__name__}, which has {names}",
            expected=f"the {role} there",
            cure="add it with model.add_adapter(config, name) first; lora.add_teacher(model, like=name) adds a teacher",
        )
    trouble = _trouble(root, adapter, [layer for _, layer in found])
    if trouble:
        raise RoleError(f"{role}: adapter {adapter!r} {trouble[0]}", expected="plain LoRA layers", cure=trouble[1])
    return found


def _trouble(root: nn.Module, adapter: str, found: list[Any]) -> tuple[str, str] | None:
    """Return what is wrong with an adapter and its cure, or None."""
    extra = {name for layer in found for name in layer.adapter_layer_names if name not in MATRICES}
    odd = sorted(name for name in extra if any(adapter in getattr(layer, name, ()) for layer in found))
    variants = {type(v[adapter]).__name__ for v in (getattr(x, "lora_variant", {}) for x in found) if adapter in v}
    if any(layer.merged for layer in found):
        return "on a base that holds merged adapters", "call unmerge_adapter() on it first"
    if odd or variants:
        what = ", ".join([*odd, *variants])
        return f"with {what}", "leave use_dora= and other variants of LoRA away, and target no embeddings"
    for name, config in getattr(root, "peft_config", {}).items():  # of all: they share the base
        of = "" if name == adapter else f"beside {name!r}, which is "
        if getattr(config, "bias", "none") != "none":
            return f"{of}with bias={config.bias!r}, which trains the base", 'use LoraConfig(bias="none")'
        if getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None):
            return f"{of}with modules_to_save, copies of whole layers", "target those layers by the LoRA instead"
        init = getattr(config, "init_lora_weights", True)
        if not (isinstance(init, bool) or init == "gaussian"):
            return f"{of}with init_lora_weights={init!r}, which changes the base", 'use True or "gaussian"'
    return None


def check_pair(teacher: str | None, fake_score: str | None) -> None:
    """Raise MismatchError unless two roles are both adapters on the same base with the same scales, or neither is one.

    Args:
        teacher: Its `identity`; None if it is no adapter.
        fake_score: Likewise.

    Raises:
        MismatchError: If not.
    """
    if teacher == fake_score:
        return
    cure = "add the teacher with lora.add_teacher(model, like=...), and pass ScoreNetwork(model, adapter=...) for both"
    if None in (teacher, fake_score):
        found = "one role that is a LoRA adapter and one that is a whole network"
        raise MismatchError(found, expected="two adapters on one base, or two networks", cure=cure)
    raise MismatchError(
        "two adapters on different bases, of different targets or scales (lora_alpha / r, with use_rslora / sqrt(r))",
        expected="one base, and one set of target_modules, lora_alpha, r and use_rslora",
        cure=cure,
    )
