"""Published accuracies of private image classifiers, reproduced with their settings.

    python benchmarks/published.py --minutes 60    # extends published.jsonl, then writes published.md
    python benchmarks/published.py --report        # the page only

Nothing is chosen here: every number of a setting is the published one, so all runs use the whole training split and are
judged once, after the last epoch, on the test split. Needs ``benchmarks/data.py``.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.runs import DELTA, Results, Run
from benchmarks.stats import markdown_table
from benchmarks.tasks import be_quiet
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """One published figure.

    Args:
        name: of the row.
        source: of the figure.
        accuracy: as published, in per cent, with its spread where there is one.
        epsilon: as published, at delta 1e-5.
        run: the same setting here.
        verified: whether the figure was read in its source for this page, or quoted from memory.
    """

    name: str
    source: str
    accuracy: str
    epsilon: str
    run: Run
    verified: bool = True


MNIST = Run("mnist", "relu cnn", 15, 240, 0.25, sigma=1.3, clip=1.5, report=True)
UNIT = Run("mnist:unit", "relu cnn", 10, 256, 0.32, sigma=1.2, clip=1.0, report=True)
FASHION = Run("fashion_mnist", "tanh cnn", 40, 2048, 4.0, epsilon=3.0, clip=0.1, report=True)
OPACUS, TF, AUTO = "Opacus, examples/mnist", "TF Privacy, tutorials", "Bu et al. 2023"
SETTINGS = (
    Setting("MNIST, sigma 1.3, 15 epochs", OPACUS, "94.63 (std .34)", "1.19", MNIST),
    Setting(
        "MNIST, sigma 1.1, 60 epochs",
        OPACUS,
        "96.78 (std .21)",
        "3.01",
        MNIST.but(epochs=60, lr=0.15, sigma=1.1, clip=1.0),
    ),
    Setting("MNIST, sigma .7, 45 epochs", OPACUS, "97.09 (std .17)", "7.10", MNIST.but(epochs=45, sigma=0.7)),
    Setting(
        "MNIST, without privacy, 20 epochs",
        OPACUS,
        "98.94 (std .32)",
        "-",
        MNIST.but(epochs=20, lr=0.1, sigma=None, clip=1.0),
    ),
    Setting("MNIST, sigma 1.2, 10 epochs", TF, "95.0", "1.20", UNIT),
    Setting("MNIST, sigma 1.12, 60 epochs", TF, "96.6", "2.92", UNIT.but(epochs=60, lr=0.08, sigma=1.12)),
    Setting("MNIST, sigma .6, 30 epochs", TF, "97.3", "9.74", UNIT.but(epochs=30, lr=0.4, sigma=0.6)),
    Setting("Fashion-MNIST, flat clipping, 40 epochs", AUTO, "86.04", "3", FASHION, False),
    Setting(
        "Fashion-MNIST, AUTO-S, 40 epochs",
        AUTO,
        "86.36",
        "3",
        FASHION.but(clip=1.0, clipping="automatic", lr=0.4),
        False,
    ),
    Setting("Fashion-MNIST, tanh, 40 epochs", "Papernot et al. 2021", "86.1", "2.7", FASHION.but(epsilon=2.7), False),
)
#: All runs, the first seed of every row before the second one.
QUEUE = [setting.run.but(seed=seed) for seed in SEEDS for setting in SETTINGS]
RECORDS = 60_000
PAGE = """# Published accuracies, run again

Written by `python benchmarks/published.py`. Each setting is run with its published numbers on real data and judged once, after
the last epoch, on the 10,000 test records. Nothing was chosen here. Ours: mean ± standard error over the seeds in brackets, in
per cent. A published spread is the standard deviation over ten runs. Epsilon is at delta 1e-5; PLD and RDP are our accountants
for the same sigma, sampling rate and number of steps. The published epsilons are larger because they use an older conversion of
RDP: it gives 1.16, 2.91 and 6.86 for Opacus' first three rows and 1.20 for TF Privacy's first. "From memory" marks figures
whose source could not be opened for this page.

{table}

{runs}

Differences to the sources: initial weights are PyTorch's; batches are Poisson samples; MNIST pixels are scaled by the published
mean and standard deviation, or by 255 for the rows of TF Privacy; convolutions use the channels-last memory layout.

Not run: {missing}.
"""


def epsilons(run: Run, results: Results) -> list[str]:
    """Return the epsilon of a setting by PLD and by RDP, from its numbers alone."""
    line, rate = results.lines.get(run), run.batch / RECORDS
    sigma = run.sigma if run.sigma is not None else line and line["sigma"]
    if sigma is None:
        return ["-", "-"]
    ledger = Ledger()
    ledger.record(PrivacyEvent.poisson(noise_multiplier=sigma, sample_rate=rate), round(run.epochs / rate))
    return [f"{make_accountant(name).epsilon(ledger, DELTA):.2f}" for name in ("pld", "rdp")]


def page(results: Results) -> str:
    """Return the page, from the lines of the file."""
    rows, runs, missing = [], [], []
    for setting in SETTINGS:
        mean = results.mean(setting.run, SEEDS)
        source = setting.source + ("" if setting.verified else " (from memory)")
        shown = (
            "not run"
            if mean is None
            else f"{100 * mean.value:.2f} ± {100 * mean.error:.2f} ({mean.count})".replace("± nan ", "")
        )
        rows.append([setting.name, source, setting.accuracy, shown, setting.epsilon, *epsilons(setting.run, results)])
        lines = [results.lines[run] for run in (setting.run.but(seed=seed) for seed in SEEDS) if run in results.lines]
        missing += [] if lines else [setting.name]
        runs += [
            [
                setting.name,
                line["run"]["seed"],
                f"{100 * line['accuracy']:.2f}",
                line["steps"],
                round(line["seconds"]),
                round(line["processor_seconds"]),
                line["machine"],
                line["commit"],
                line["day"],
            ]
            for line in lines
        ]
    header = ["setting", "source", "published, %", "ours, %", "published epsilon", "PLD", "RDP"]
    columns = ["run", "seed", "accuracy, %", "steps", "seconds", "of the processor", "machine", "commit", "day"]
    return PAGE.format(
        table=markdown_table(header, rows), runs=markdown_table(columns, runs), missing="; ".join(missing) or "none"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="no run starts after so many")
    parser.add_argument("--report", action="store_true", help="no runs")
    options = parser.parse_args()
    be_quiet()
    results = Results(HERE / "published.jsonl")
    if not options.report:
        results.fill(QUEUE, until=time.time() + 60 * options.minutes)
    (HERE / "published.md").write_text(page(results))


if __name__ == "__main__":
    main()
