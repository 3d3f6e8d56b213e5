"""Checks of the engine on a GPU, and the cost of a private step there: ``python -m benchmarks.gpu_check`` (under eight
minutes).

Correctness: per-sample gradients against batch-of-one autograd, norms and clipped sums of bfloat16 layers against
float64, the number of times that a step waits for the device, the noise's standard deviation, fits with all checks in
float32 and bf16-mixed, and the sum of a sharded module against that of a whole one. Cost: step time and peak memory of
three models in bf16 at batch 64, against a plain step, in pairs; and of Opacus' faster mode on two models that it can
run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gpu_cost import DEVICE, MODELS, Encoder, cost, peer, prepared
from lightning_dp.noise import GaussianNoise
from lightning_dp.per_sample import PerSampleEngine


def check_engine() -> dict[str, float]:
    """Return the largest relative difference of per-sample gradients from batch-of-one autograd, by module."""
    image = torch.randn(4, 3, 12, 12, device=DEVICE)
    cases: dict[str, tuple[nn.Module, Tensor]] = {
        "mlp": (nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)), torch.randn(4, 5, 7, device=DEVICE)),
        "cnn": (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 3)),
            image,
        ),
        "encoder": (Encoder(2, 32, 4, 9, 50), torch.randint(0, 50, (4, 9), device=DEVICE)),
        "lstm": (nn.Sequential(nn.LSTM(7, 6, batch_first=True)), torch.randn(4, 5, 7, device=DEVICE)),
    }
    found = {}
    for name, (module, x) in cases.items():
        module.to(DEVICE)

        def loss(rows: Tensor, module: nn.Module = module) -> Tensor:
            out = module(rows)
            return (out[0] if isinstance(out, tuple) else out).square().flatten(1).sum(1)

        parameters = dict(module.named_parameters())
        engine = PerSampleEngine(module)
        engine.attach()
        engine.set_parameters(parameters)
        engine.learn_layout(
            lambda size, x=x, loss=loss: loss(x[:2].repeat(2, *[1] * (x.dim() - 1))[:size]).sum(), (2, 3)
        )
        engine.begin(len(x))
        loss(x).sum().backward()
        made = engine.per_sample_gradients()
        engine.end()
        engine.detach()
        worst = 0.0
        for row in range(len(x)):
            alone = torch.autograd.grad(loss(x[row : row + 1]).sum(), list(parameters.values()))
            size = torch.cat([g.flatten() for g in alone]).norm()
            off = torch.cat([(made[n][row] - g).flatten() for n, g in zip(parameters, alone, strict=True)]).norm()
            worst = max(worst, float(off / size))
        found[name] = worst
    return found


def check_short() -> dict[str, float | bool]:
    """Return how far norms and clipped sums of a bfloat16 layer are from those in float64, and whether it multiplies in
    bfloat16.

    ``norm``: the lowest norm over the exact one, of 1,024 positions whose terms nearly cancel (not below 1). ``sum``:
    the largest contribution over its bound (at most 1.00001).
    """
    from lightning_dp.per_sample.rules import short
    from lightning_dp.per_sample.rules.base import Call
    from lightning_dp.per_sample.rules.linear import LinearRule

    lowest, largest = float("inf"), 0.0
    for positions in (2, 128, 1024):
        for width, height in ((768, 3072), (3072, 768), (64, 64)):
            pairs = torch.randn(4, positions // 2, width, device=DEVICE).repeat_interleave(2, 1).bfloat16()
            backprop = torch.randn(4, positions // 2, height, device=DEVICE).repeat_interleave(2, 1)
            signs = torch.tensor([1.0, -1.0], device=DEVICE).repeat(positions // 2)[:, None]
            drift = 1 + torch.arange(positions, device=DEVICE)[:, None] / (16 * positions)
            backprop = (backprop * drift).bfloat16() * signs.bfloat16()
            call, layer = Call(inputs=(), kwargs={}, activation=pairs, backprop=backprop), nn.Linear(width, height)
            norms = LinearRule().squared_norms(layer, [call], 4, {"weight"})["weight"].sqrt()
            exact = torch.bmm(backprop.double().mT, pairs.double()).flatten(1).norm(dim=1)
            lowest = min(lowest, float((norms / exact).min()))
            for sample in range(4):
                out = torch.zeros(height, width, device=DEVICE)
                factors = torch.zeros(4, device=DEVICE)
                factors[sample] = 0.37 / norms[sample]
                LinearRule().add_weighted_sum(layer, [call], factors, 4, {"weight": out})
                largest = max(largest, float(out.double().norm()) / 0.37)
    return {"short": short.has_short_products(DEVICE.type), "norm": lowest, "sum": largest}


def check_waits() -> dict[str, int]:
    """Return how often the fourth step of a transformer waits for the device, by depth.

    Two waits are for the copies of the batch; a CPU never waits.
    """
    found = {}
    for depth in (2, 6):
        run, _ = prepared((depth, 64, 2, 16, 50))
        batches = (item for _ in range(100) for item in run.loader)
        for _ in range(3):
            run.step(next(batches))
        batch = next(batches)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            run.step(batch)
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        found[f"{depth} layers"] = sum("synchroniz" in str(each.message) for each in seen)
        run.close()
    return found


def check_noise() -> float:
    """Return the standard deviation of 2^22 draws at std 3, over 3."""
    return float(GaussianNoise().add_(torch.zeros(2**22, device=DEVICE), 3.0).std()) / 3


def fits() -> dict[str, str]:
    """Return the results of fits through a Trainer with all checks, by precision."""
    import lightning as L

    from lightning_dp import DPStrategy

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(
                nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(288, 4)
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    data = TensorDataset(torch.randn(256, 1, 8, 8), torch.randint(0, 4, (256,)))
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        for microbatch_size in (None, 16):
            strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-4, microbatch_size=microbatch_size)
            trainer = L.Trainer(
                max_epochs=2, strategy=strategy, devices=1, precision=precision, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(Classifier(), DataLoader(data, batch_size=64))
            found[f"{precision}, microbatch_size={microbatch_size}"] = f"epsilon {strategy.epsilon():.4f}"
    return found


def sharded() -> float:
    """Return the relative difference between the released sums of a sharded module on one device and of a whole one."""
    import lightning as L
    from torch.distributed.fsdp import fully_shard

    from lightning_dp import DPFSDPStrategy, DPStrategy

    class Classifier(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))
            self.released = torch.zeros(0)

        def configure_model(self) -> None:
            if self.device_mesh is not None:
                for layer in (self.network[0], self.network[3], self.network):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            gradients: list[Any] = [parameter.grad for parameter in self.parameters()]
            whole = [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in gradients]
            self.released = torch.cat([gradient.flatten() for gradient in whole]).clone()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 16), torch.randint(0, 4, (64,)))
    found = []
    for kind in (DPStrategy, DPFSDPStrategy):
        module = Classifier()
        trainer = L.Trainer(
            max_steps=1, strategy=kind(noise_multiplier=0.0, target_delta=1e-4), devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=64))
        found.append(module.released)
    torch.distributed.destroy_process_group()
    return float((found[1] - found[0]).norm() / found[0].norm())


def main() -> None:
    """Run everything and print one JSON object per part; a part that fails says so."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__}), flush=True)
    parts: dict[str, Callable[[], Any]] = {
        "engine": check_engine,
        "short": check_short,
        "waits": check_waits,
        "noise": check_noise,
        "fits": fits,
        "sharded": sharded,
    }
    parts |= {title: (lambda shape=shape: cost(shape)) for title, shape in MODELS.items()}
    parts |= {f"Opacus, {name}": (lambda name=name: peer(name)) for name in ("vit", "bert")}
    for title, part in parts.items():
        try:
            result = part()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        print(json.dumps({title: result}), flush=True)


if __name__ == "__main__":
    main()
