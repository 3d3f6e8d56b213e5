"""The command line: one parser, four commands, one line per error.

Torch, lightning and the accountants are imported by the command that needs them, so that help costs little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from typing_extensions import override

from lightning_dp import __version__
from lightning_dp.errors import PrivacyError

#: The keys of ``ACCOUNTANTS`` and ``NEIGHBORING_RELATIONS``; those are slow to import.
ACCOUNTANTS = ("pld", "rdp", "prv", "gdp", "tcdp")
RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")
EXIT_CODES = "Exit codes: 0 done, 1 `check` found a layer that must change, 2 an error."


class _Parser(argparse.ArgumentParser):
    @override
    def error(self, message: str) -> NoReturn:
        """Write the error in one line, without the usage, and end the process."""
        self.exit(2, f"{self.prog}: error: {message}. See {self.prog} --help.\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``lightning-dp``."""
    parser = _Parser(prog="lightning-dp", description="Differential privacy on the command line.", epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    epsilon = commands.add_parser("epsilon", help="epsilon of a planned run, by every accountant")
    epsilon.add_argument("--noise-multiplier", type=float, required=True, help="noise std over sensitivity, >= 0")
    epsilon.add_argument(
        "--records-per-user",
        type=int,
        metavar="G",
        help="also print the epsilon for adding or removing a user who has at most G of the records; takes seconds",
    )
    _add_run(epsilon)
    epsilon.set_defaults(source="accounting")

    calibrate = commands.add_parser("calibrate", help="the noise multiplier that a target epsilon needs")
    calibrate.add_argument("--target-epsilon", type=float, required=True, help="budget of the whole run, > 0")
    _add_run(calibrate)
    calibrate.set_defaults(source="accounting")

    checking = commands.add_parser("check", help="how each layer of a module is handled, and what must change")
    checking.add_argument("target", metavar="FILE.py:NAME", help="a class, a function that makes a module, or a module")
    checking.add_argument("--init", metavar="JSON", help="arguments of the class or function, e.g. '{\"hidden\": 64}'")
    checking.set_defaults(source="check")

    stating = commands.add_parser("card", help="the privacy statement of a checkpoint")
    stating.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="+", help="file written under a private strategy; several runs add up"
    )
    stating.add_argument("--markdown", action="store_true", help="the whole privacy card as Markdown")
    stating.set_defaults(source="card")

    for command in (epsilon, calibrate, checking, stating):
        command.add_argument("--json", action="store_true", help="JSON for machines")
        command.epilog = EXIT_CODES
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of ``lightning-dp``.

    Args:
        arguments: command-line arguments without the program's name; by default the arguments of the process.

    Returns:
        The exit code.
    """
    options = make_parser().parse_args(arguments)
    run = getattr(import_module(f"lightning_dp.cli.{options.source}"), options.command)
    try:
        return int(run(options))
    except (ValueError, TypeError, OSError, PrivacyError) as error:
        sys.stderr.write(f"lightning-dp {options.command}: error: {' '.join(str(error).split())}\n")
        return 2


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a planned run to a parser."""
    parser.add_argument("--dataset-size", type=int, required=True, metavar="N", help="number of records, or of users")
    parser.add_argument(
        "--unit",
        choices=["record", "user"],
        default="record",
        help="whose presence is hidden, and what N and B count (default: record)",
    )
    parser.add_argument(
        "--batch-size", type=int, required=True, metavar="B", help="expected batch size, over all devices"
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=int, help="passes of round(N / B) steps each")
    length.add_argument("--steps", type=int, help="logical steps, instead of epochs")
    parser.add_argument("--delta", type=float, help="in (0, 1); default: 1 / (10 N) rounded down to a power of ten")
    parser.add_argument(
        "--schedule",
        metavar="KIND[:FACTOR[:EVERY]]",
        help="of the noise, as NoiseScheduler: step:0.9:15 multiplies sigma by 0.9 after every 15 epochs; "
        "step:rate=0.81:15 multiplies its variance",
    )
    parser.add_argument(
        "--accountant",
        action="append",
        choices=ACCOUNTANTS,
        help="only this one; may be given several times (default: all)",
    )
    parser.add_argument(
        "--sampling",
        choices=["poisson", "shuffle", "cyclic"],
        default="poisson",
        help="default: poisson; shuffle: each record in one batch per pass (random allocation; without amplification "
        "under another relation than add_or_remove_one); cyclic: the same batches in every pass, without "
        "amplification",
    )
    parser.add_argument(
        "--correlated",
        metavar="auto|DECAY|bands=P",
        help="noise that is correlated between steps, with --sampling cyclic, which also stands for a stream in a "
        "fixed order",
    )
    parser.add_argument(
        "--neighboring-relation",
        choices=RELATIONS,
        default="add_or_remove_one",
        help="default: add_or_remove_one",
    )
