"""The commands of `disback`, one module each; `disback_plugin.cli` says what such a module contains."""
