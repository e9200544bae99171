"""Images to feature vectors, for distances between sets of them.

A distance on timm's features is NOT the FID, and not comparable with any published number: the FID is defined by one
Inception network, its weights and its resizing. For the real one install the extra `fid` (torch-fidelity, which
downloads that network) and compare two folders of images:

    fidelity --gpu 0 --fid --input1 samples/ --input2 data/
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disback_plugin.errors import OptionError
from disback_plugin.noise import expand

__all__ = ["features"]


def features(
    model_or_name: nn.Module | str,
    *,
    pretrained: bool = True,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> Callable[[Tensor], Tensor]:
    """Return a function from images to features: `frechet_distance(extract(a), extract(b))`. NOT the FID.

    Args:
        model_or_name: The name of a timm model, which then gets images in [-1, 1], of 1 or 3 channels and any size,
            resized and normalised as it was trained; or any network in evaluation mode, called on the images as they
            are, whose output of shape (B, ...) is flattened.
        pretrained: Whether a named model has its trained weights, which timm downloads. Random ones, always the same,
            are good for tests, or as a weak control.
        device: Where a named model runs.
        batch_size: Images in one pass, >= 1.

    Returns:
        The function: images, shape (n, C, H, W), n >= 1, to features, shape (n, d), float32 or the network's dtype, on
        the CPU. It changes no gradient, flag or random state.

    Raises:
        OptionError: If timm has no such model, or the network is in training mode: its statistics would change.

    Example:
        >>> extract = features("resnet10t", pretrained=False)
        >>> extract(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 512])
    """
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size}", expected="a count >= 1", cure="pass batch_size=64")
    net = _timm(model_or_name, pretrained, device) if isinstance(model_or_name, str) else model_or_name
    if any(module.training for module in net.modules()):
        raise OptionError("a network in training mode", expected="one in evaluation mode", cure="call its eval() first")

    def extract(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([net(batch).flatten(1).cpu() for batch in torch.split(images, batch_size)])

    return extract


def _timm(name: str, pretrained: bool, device: torch.device | str) -> nn.Module:
    import timm
    from timm.data.config import resolve_model_data_config

    if not timm.is_model(name):
        raise OptionError(f"the model {name!r}", expected="one of timm.list_models()", cure="correct the name")
    # Even what is overwritten by trained weights is drawn first, from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = timm.create_model(name, pretrained=pretrained, num_classes=0)
    config = resolve_model_data_config(net)  # type: ignore[no-untyped-call]
    return _AsTrained(net, config["input_size"][-2:], config["mean"], config["std"]).to(device).eval()


class _AsTrained(nn.Module):
    """A timm model that takes images in [-1, 1]."""

    def __init__(self, net: nn.Module, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net, self.size = net, size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.mean).expand(-1, len(self.mean), -1, -1)
        images = F.interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        like = images[0]
        output: Tensor = self.net(((images + 1) / 2 - expand(self.mean, like)) / expand(self.std, like))
        return output
