"""Run the trainer: `accelerate launch -m disback_adapters.lcm_lora student --teacher DIR_OR_HUB --prompts FILE ...`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from disback_plugin.errors import DisbackError, OptionError, RoleError

USE = "use: python -m disback_adapters.lcm_lora student --teacher DIR_OR_HUB --prompts FILE --output DIR ..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trainer; return 0, 1 if the run is broken, or 2 for wrong use."""
    command, *given = [*(sys.argv[1:] if arguments is None else arguments)] or [""]
    if command != "student":
        sys.stderr.write(f"{USE}\n(`teacher_schedule` is `disback run --adapter lcm_lora SCRIPT`)\n")
        return 2
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("disback_plugin").setLevel(logging.INFO)
    from disback_adapters.lcm_lora.roles import read
    from disback_adapters.lcm_lora.training import Trainer

    try:
        Trainer(read(given)).run()
    except DisbackError as error:
        sys.stderr.write(f"disback: {error}\n")
        return 2 if isinstance(error, (OptionError, RoleError)) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
