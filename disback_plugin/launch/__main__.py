"""`python -m disback_plugin.launch`, for torchrun and accelerate launch."""

from disback_plugin.launch.command_line import main

raise SystemExit(main())
