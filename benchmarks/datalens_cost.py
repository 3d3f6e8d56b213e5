"""The cost of a DataLens step with ten times as many teachers.

    python benchmarks/datalens_cost.py              # benchmarks/datalens_cost.json and its section of README.md

A step is one ``training_step`` in a Lightning Trainer: two updates of every teacher, votes, noise, one update of the
generator. Both sizes run in turn; a figure is the median of the pairs' ratios. The records grow with the teachers, so
that each sees as many.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.readme import write_section
from benchmarks.step_machine import environment
from benchmarks.step_runs import Clock
from lightning_dp.datalens import DataLens, MLPDiscriminator, MLPGenerator, StepsOver

HERE = Path(__file__).parent
FEW, MANY, GOAL = 100, 1000, 5.0
RECORDS_A_TEACHER, CLASSES, Z_DIM = 20, 4, 8
#: name -> number of features, k, width of a teacher; 32 is the default of ``MLPDiscriminator``
CASES: dict[str, tuple[int, int, int]] = {
    "points, narrow": (2, 1, 16),
    "points": (2, 1, 32),
    "points, wide": (2, 1, 64),
    "table, narrow": (30, 5, 16),
    "table": (30, 5, 32),
    "table, wide": (30, 5, 64),
}


def seconds(case: str, num_teachers: int, steps: int, chunk_size: int) -> float:
    """Return seconds per step, after two warm-up steps."""
    features, top_k, width = CASES[case]
    generator = MLPGenerator(Z_DIM, features, num_classes=CLASSES)
    discriminator: nn.Module = MLPDiscriminator(features, num_classes=CLASSES, hidden=width)
    records = num_teachers * RECORDS_A_TEACHER
    data = TensorDataset(torch.rand(records, features) * 2 - 1, torch.randint(CLASSES, (records,)))
    model = DataLens(
        generator,
        discriminator,
        num_teachers=num_teachers,
        top_k=top_k,
        sigma=100.0,
        target_delta=1e-6,
        z_dim=Z_DIM,
        num_classes=CLASSES,
        batch_size=32,
        pretrain_steps=0,
        teacher_chunk_size=chunk_size,
    )
    clock = Clock()
    trainer = L.Trainer(
        max_steps=steps + 3,
        accelerator="cpu",
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, StepsOver(data, steps_per_epoch=steps + 3))
    return (clock.began[-1] - clock.began[2]) / (len(clock.began) - 3)


def run_case(case: str, pairs: int, steps: int, chunk_size: int) -> dict[str, Any]:
    """Time few teachers and many, pair by pair."""
    few, ratios = [], []
    for _ in range(pairs):
        few.append(seconds(case, FEW, steps, chunk_size))
        ratios.append(seconds(case, MANY, steps, chunk_size) / few[-1])
    return {
        "few_ms": 1e3 * statistics.median(few),
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "pairs": pairs,
    }


def table(results: dict[str, Any]) -> str:
    """Return the section of the README."""
    rows = []
    for name, case in results["cases"].items():
        features, _, width = CASES[name]
        spread = f"{case['ratio']:.2f} ({case['min']:.2f} to {case['max']:.2f})"
        reached = "yes" if case["ratio"] < GOAL else "no"
        a_teacher = (case["ratio"] - 1) * case["few_ms"] / (MANY - FEW)
        once = case["few_ms"] - FEW * a_teacher
        rows.append(
            f"| {name} ({features} features, width {width}) | {case['few_ms']:.1f} | {once:.1f} | "
            f"{1e3 * a_teacher:.0f} | {spread} | < {GOAL:g} | {reached} |"
        )
    where = ", ".join(f"{key} {value}" for key, value in results["environment"].items())
    return "\n".join(
        [
            f"| case | {FEW} teachers, ms per step | of that fixed, ms | and per teacher, µs | {MANY} teachers, times "
            "that | goal | reached |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Matrix products are computed for all teachers of a chunk at once. The overhead of a step is therefore "
            "paid once, and narrow teachers are cheap in any number. A step costs `fixed + teachers x per teacher`; "
            f"both come from the two sizes. The factor is under {GOAL:g} if the fixed cost is more than "
            f"{(MANY - GOAL * FEW) / (GOAL - 1):.0f} times the cost per teacher. It tends to {MANY // FEW} as the "
            "overhead gets small.",
            "",
            f"Median, smallest and largest of {next(iter(results['cases'].values()))['pairs']} alternating pairs; "
            f"{where}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "datalens_cost.json")
    parser.add_argument("--no-readme", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    results = {
        "environment": environment(),
        "cases": {name: run_case(name, options.pairs, options.steps, options.chunk_size) for name in CASES},
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    if not options.no_readme:
        write_section("datalens_cost", text)
    print(text)


if __name__ == "__main__":
    main()
