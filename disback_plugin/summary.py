"""What a handle shows of itself: who plays which role, the plan, and what happens at which update."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from disback_plugin.loop import optimizers
from disback_plugin.path.manifest import Manifest
from disback_plugin.path.model_card import ROWS
from disback_plugin.schedules import Target
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import whole_shape

__all__ = ["agenda", "cast", "described"]


def cast(
    teacher: ScoreNetwork,
    fake_score: ScoreNetwork,
    generator_optimizers: Sequence[Optimizer],
    fake_score_optimizers: Sequence[Optimizer],
    *,
    walks: bool,
) -> list[tuple[str, str, str]]:
    """Return a row for each network: its name, what it is, and its role; `walks` says whether there is a path."""
    weights = sum(whole_shape(parameter).numel() for parameter in optimizers.parameters(generator_optimizers))
    steppers = [", ".join(type(o).__name__ for o in group) for group in (generator_optimizers, fake_score_optimizers)]
    real, fake, still = (
        ("walks the path, ", "ends the recording as s'_N, ", "held still while recording, ") if walks else ("", "", "")
    )
    return [
        ("teacher", _describe(teacher), f"s_theta, the real score: {real}is never trained"),
        ("fake score", _describe(fake_score), f"s_phi: {fake}trained by {steppers[1]}"),
        ("generator", f"{weights:,} weights", f"{still}trained by {steppers[0]}"),
    ]


def described(
    teacher: ScoreNetwork,
    fake_score: ScoreNetwork,
    generator_optimizers: Sequence[Optimizer],
    fake_score_optimizers: Sequence[Optimizer],
) -> dict[str, dict[str, str]]:
    """Return what the networks and their optimizers are, as plain text, for a log."""
    roles = cast(teacher, fake_score, generator_optimizers, fake_score_optimizers, walks=False)
    steppers = {"generator": generator_optimizers, "fake score": fake_score_optimizers}
    return {
        "networks": {name: what for name, what, _ in roles},
        "optimizers": {
            name: "; ".join(_with_rates(optimizer) for optimizer in group) for name, group in steppers.items()
        },
    }


def _with_rates(optimizer: Optimizer) -> str:
    known = [group["lr"] for group in optimizer.param_groups if group.get("lr") is not None]  # Adafactor may have None
    rates = dict.fromkeys(f"{float(rate):g}" for rate in known)
    return f"{type(optimizer).__name__}, learning rate {' and '.join(rates) or 'of its own'}"


def _describe(network: ScoreNetwork) -> str:
    tensors = [tensor for _, tensor in network.named_tensors()]
    kinds = sorted({type(module).__name__ for module in network.modules().values()})
    held = sorted({f"{str(t.dtype).removeprefix('torch.')}, {t.device}" for t in tensors if t.is_floating_point()})
    what = ("" if network.lora_adapter is None else f"LoRA {network.lora_adapter!r} on ") + " + ".join(kinds)
    return f"{what}, {sum(whole_shape(tensor).numel() for tensor in tensors):,} weights, {' and '.join(held)}"


def agenda(
    manifest: Manifest | None, recorded: int | None, stages: Sequence[tuple[int, Target]], updates: int
) -> list[tuple[str, str, str]]:
    """Return a row for each thing that happens: "->" at where the run is, when, and what.

    Args:
        manifest: The path's; None if there is none.
        recorded: Fake-score updates recorded so far; None once recording is over.
        stages: Generator updates, and what the walk aims at from there on; none if the recording has to say.
        updates: Generator updates so far.

    Example:
        >>> from disback_plugin.path.manifest import Recording, Teacher
        >>> recorded = Manifest(Teacher("", ""), Recording(4, 2))
        >>> for row in agenda(recorded, None, [(0, Target(1.0)), (30, Target(0.0))], 7):
        ...     print(row)
        ('', 'recorded', "4 fake-score updates, nodes s'_1 to s'_2")
        ('->', 'generator update 0', 'teacher at position 1')
        ('', 'generator update 30', 'teacher at position 0: itself, for good')
    """
    rows: list[tuple[str, str, str]] = []
    if manifest is not None:
        nodes = f"nodes s'_1 to s'_{manifest.last_node}"
        if recorded is None:
            rows.append(("", "recorded", f"{manifest.iterations} fake-score updates, {nodes}"))
        else:
            due = min(manifest.iterations, (recorded // manifest.recording.every + 1) * manifest.recording.every)
            most = "" if stages else "at most "
            what = f"{recorded} of {most}{manifest.iterations} fake-score updates, {nodes}, the next one at {due}"
            rows.append(("->", "recording", what))
    if not stages:
        rows.append(("", "then", "back along the path, in the F generator updates that s_phi needs to be fitted"))
    now = None if recorded is not None else max((start for start, _ in stages if start <= updates), default=None)
    last = len(stages) - 1
    for index, (start, target) in enumerate(stages):
        if len(stages) > ROWS and ROWS // 2 <= index <= last - ROWS // 2 and start != now:
            if index == ROWS // 2:
                rows.append(("", "...", f"{len(stages) - ROWS} more"))
            continue
        rows.append(("->" if start == now else "", f"generator update {start}", _aim(target, index == last)))
    return rows


def _aim(target: Target, last: bool) -> str:
    where = "teacher at position 0: itself, for good" if last else f"teacher at position {target.position:.4g}"
    return where if target.gradient == 1 else f"{where}, the generator's gradient times {target.gradient:.4g}"
