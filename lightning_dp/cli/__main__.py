"""``python -m lightning_dp.cli``: the ``lightning-dp`` command if its script is not installed."""

import sys

from lightning_dp.cli.main import main

sys.exit(main())
