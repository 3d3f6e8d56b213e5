"""The ``lightning-dp`` command: the cost of noise, the noise for a budget, the layers of a module, the promise of a
checkpoint.
"""

from lightning_dp.cli.main import main

__all__ = ["main"]
