"""The ``lightning-dp`` command: what noise costs, how much a budget needs, what a module needs, what a checkpoint
promises.
"""

from lightning_dp.cli.main import main

__all__ = ["main"]
