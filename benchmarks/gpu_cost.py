"""The cost of a private step on a GPU, over a plain one and over that of Opacus; run by ``gpu_check``."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp.loop import PrivateLoop, make_private

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = "--smoke" in sys.argv or DEVICE.type == "cpu"
BATCH, PAIRS = (8, 2) if SMALL else (64, 7)
MODELS = {  # depth, width, heads, tokens, vocabulary (0: vectors)
    "ViT-B/16-sized": (12, 768, 12, 197, 0),
    "BERT-base-sized": (12, 768, 12, 128, 30522),
    "GPT-2-sized": (12, 768, 12, 256, 50257),
}


class Encoder(nn.Module):
    """A transformer encoder with an embedding, or a projection of patches, and a head on the mean."""

    def __init__(self, depth: int, width: int, heads: int, tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width) if vocabulary else nn.Linear(width, width)
        self.positions = nn.Parameter(torch.zeros(1, tokens, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x) + self.positions).mean(1))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    features, labels = (tensor.to(DEVICE) for tensor in batch)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = model(features)
    return F.cross_entropy(outputs.float(), labels)


def peer(name: str) -> dict[str, float | str]:
    """Return the time of a step of Opacus over a plain one for a case of step_cost.py, by mode; a mode that fails says
    so.
    """
    from benchmarks import step_runs
    from benchmarks.cases import CASES

    case = replace(CASES["mlp"], batch_size=BATCH) if SMALL else CASES[name]
    plain = step_runs.run(case, "plain", 3).seconds_a_step(step_runs.WARMUP)
    found: dict[str, float | str] = {}
    for mode in ("ghost", "hooks"):
        try:
            found[mode] = step_runs.run(case, mode, 3).seconds_a_step(step_runs.WARMUP) / plain
        except Exception as error:
            found[mode] = f"{type(error).__name__}: {error}"
    return found


def cost(shape: tuple[int, int, int, int, int]) -> dict[str, float]:
    """Return time and peak memory of a private step over a plain one, medians of pairs."""
    shape = (1, 32, 2, 8, shape[4] and 50) if SMALL else shape
    plain = Encoder(*shape).to(DEVICE)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.0)
    run, data = prepared(shape)
    batch = next(iter(DataLoader(data, batch_size=BATCH)))

    def plain_step() -> None:
        optimizer.zero_grad()
        loss_fn(plain, batch).backward()
        optimizer.step()

    batches = (item for _ in range(1000) for item in run.loader)

    def private_step() -> None:
        run.step(next(batches))

    for step in (plain_step, private_step, plain_step, private_step):
        step()
    ratios = [measured(private_step)[0] / measured(plain_step)[0] for _ in range(PAIRS)]
    memory = measured(private_step)[1] / max(measured(plain_step)[1], 1)
    return {"time": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "memory": memory}


def prepared(shape: tuple[int, int, int, int, int]) -> tuple[PrivateLoop, TensorDataset]:
    """Return a private run over an encoder of that shape, and its data of one batch."""
    _, width, _, tokens, vocabulary = shape
    features = torch.randint(0, vocabulary, (BATCH, tokens)) if vocabulary else torch.randn(BATCH, tokens, width)
    data, model = TensorDataset(features, torch.randint(0, 10, (BATCH,))), Encoder(*shape).to(DEVICE)
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.0), DataLoader(data, batch_size=BATCH)
    options: Any = {"steps": 1000, "noise_multiplier": 1.0, "target_delta": 1e-3, "check_per_sample": False}
    return make_private(model, optimizer, loader, loss_fn, **options), data


def measured(step: Callable[[], None]) -> tuple[float, int]:
    """Return seconds of three steps and the peak of allocated memory."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(3):
        step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cuda.max_memory_allocated()
    return time.perf_counter() - start, 1
