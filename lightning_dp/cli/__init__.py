"""The ``lightning-dp`` command with its subcommands ``epsilon``, ``calibrate``, ``check`` and ``card``."""

from lightning_dp.cli.main import main

__all__ = ["main"]
