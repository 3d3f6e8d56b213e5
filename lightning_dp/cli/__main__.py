"""``python -m lightning_dp.cli``: the command, if no script is installed."""

import sys

from lightning_dp.cli.main import main

sys.exit(main())
