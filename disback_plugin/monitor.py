"""Say whether the fake score follows the student: what `DivergenceMonitor` measures, in the log and as warnings."""

from __future__ import annotations

import logging

from disback_plugin import distributed
from disback_plugin.convergence import DivergenceMonitor
from disback_plugin.plugins.manager import PluginManager

logger = logging.getLogger(__name__)

# Signs of a run that goes wrong (`convergence`), and the warnings.
SIGNS = {
    "stalled": "the fake score does not follow the student, its gradients at updates in a row agree: give it a higher "
    "learning rate or more updates per generator update, unless its rate is still warming up",
    "diverged": "the fake score's gradients have grown thirtyfold or are not finite: the student runs away from it; "
    "lower the generator's learning rate",
}


def report(monitor: DivergenceMonitor, plugins: PluginManager, *, update: int, position: float, ends: bool) -> bool:
    """Read a window that has ended: log the mean cosine of s_phi's gradients, and warn once of each sign.

    Args:
        monitor: The monitor, at the end of a window.
        plugins: The plug-ins whose `disback_log` gets "disback/agreement", and 1.0 for each new sign.
        update: Generator updates so far.
        position: The teacher's position.
        ends: Whether backtracking ends when the run diverges.

    Returns:
        Whether the run has diverged and backtracking ends. All ranks must call.
    """
    signs = monitor.new_signs()
    ends = ends and "diverged" in monitor.signs
    if distributed.is_main_process():
        values = {f"disback/{sign}": 1.0 for sign in signs}
        if monitor.agreement is not None:
            values["disback/agreement"] = monitor.agreement
        if values:
            plugins.call("disback_log", values=values, step=update)
        for sign in signs:
            ending = "; the teacher is s'_0 for good" if sign == "diverged" and ends else ""
            logger.warning("update %d, position %g: %s%s", update, position, SIGNS[sign], ending)
    return ends
