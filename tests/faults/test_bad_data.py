"""Bad data and modules in bulk: any of them is accounted for, or refused before a release."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_dp import DPStrategy
from tests.faults.test_bad_input import BULK, check_run, try_examples

FEATURES = 3


# ---------------------------------------------------------------- data


class Records(Dataset):
    """So many records of one form."""

    def __init__(self, number: int, form: str) -> None:
        self.number, self.form = number, form

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Any:
        x = torch.linspace(-1, 1, FEATURES) * (index + 1)
        return {
            "tensor": x,
            "tuple": (x, index),
            "strings": (x, f"record {index}"),
            "dictionary": {"name": f"{index}", "x": x},
            "nested": {"a": [(x, "text")], "b": {"c": index, "d": torch.ones(2, 2)}},
            "array": x.numpy(),
            "lengths": x.repeat(index + 1, 1),
            "floats": x.tolist(),
            "none": (x, None),
        }[self.form]


FORMS = ["tensor", "tuple", "strings", "dictionary", "nested", "array", "lengths", "floats", "none"]
DATA = st.fixed_dictionaries(
    {
        "number": st.sampled_from([0, 1, 1, 2, 2, 3, 7]),
        "form": st.sampled_from(FORMS),
        "batch_size": st.sampled_from([1, 1, 2, 3]),
        "accumulate": st.sampled_from([1, 1, 2]),
        "sampling": st.sampled_from(["poisson", "shuffle"]),
        "microbatch_size": st.sampled_from([None, 1, 2]),
    }
)


def first_tensor(batch: Any) -> Tensor:
    """The features, wherever they are; (B, F), or (B, T, F) with zeros behind the end."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, dict):
        return first_tensor(batch.get("x", batch.get("a")))
    if isinstance(batch, list) and len(batch) == FEATURES and all(isinstance(part, Tensor) for part in batch):
        return torch.stack(batch, 1).float()
    return first_tensor(batch[0])


class Anything(L.LightningModule):
    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network or nn.Linear(FEATURES, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = first_tensor(batch)
        out = self.network(x)
        if x.dim() == 3:  # what a collate function filled up belongs to no record
            out = out * (x != 0).any(-1, keepdim=True)
        return out.flatten(1).square().sum(1).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def padded(samples: list[Tensor]) -> Tensor:
    return pad_sequence(samples, batch_first=True)


@pytest.mark.parametrize("bulk", BULK)
def test_any_dataset_is_accounted_or_refused_with_a_message(tmp_path: Any, bulk: float) -> None:
    ran: set[str] = set()

    def examine(data: dict[str, Any]) -> None:
        if data["form"] == "none":
            data = {**data, "form": "tuple"} if data["number"] == 0 else data
        collate = {"lengths": padded, "none": lambda samples: torch.stack([x for x, _ in samples])}.get(data["form"])
        loader = DataLoader(Records(data["number"], data["form"]), batch_size=data["batch_size"], collate_fn=collate)
        strategy = DPStrategy(
            noise_multiplier=1.0,
            sampling=data["sampling"],
            microbatch_size=data["microbatch_size"],
            target_delta=1e-6,
        )
        took = check_run(tmp_path, strategy, Anything(), loader, accumulate_grad_batches=data["accumulate"])
        assert took == (data["batch_size"] * data["accumulate"] <= data["number"])
        ran.add(data["form"] if took else "")

    try_examples(int(40 * bulk), DATA, examine)
    assert len(ran) > 5


# ---------------------------------------------------------------- modules


class Centred(nn.Module):
    """Takes the mean over the batch away: no sample is alone any more."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0.0


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(FEATURES, FEATURES),
    "relu": nn.ReLU,
    "norm": lambda: nn.LayerNorm(FEATURES),
    "dropout": lambda: nn.Dropout(0.5),
    "frozen": lambda: nn.Linear(FEATURES, FEATURES).requires_grad_(False),
    "broken": Broken,
    "batch norm": lambda: nn.BatchNorm1d(FEATURES),
    "centred": Centred,
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, FEATURES)),
    "lazy": lambda: nn.LazyLinear(FEATURES),
}
SAFE = {"linear", "relu", "norm", "dropout", "frozen"}


@pytest.mark.parametrize("bulk", BULK)
def test_any_module_trains_or_is_refused_before_a_release(tmp_path: Any, bulk: float) -> None:
    outcomes: set[bool] = set()
    names = st.lists(st.sampled_from([*sorted(SAFE)] * 3 + [*LAYERS]), min_size=1, max_size=4)

    def examine(chosen: list[str]) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(*(LAYERS[name]() for name in chosen))
        loader = DataLoader(Records(7, "tensor"), batch_size=3)
        took = check_run(tmp_path, DPStrategy(noise_multiplier=1.0), Anything(network), loader)
        trainable = bool({"linear", "norm"} & set(chosen))
        if set(chosen) <= SAFE:
            assert took == trainable
        last = max((place for place, name in enumerate(chosen) if name in ("linear", "norm")), default=-1)
        if "batch norm" in chosen or ("centred" in chosen[last + 1 :] and trainable and chosen[-1:] == ["centred"]):
            assert not took or "broken" in chosen
        outcomes.add(took)

    try_examples(int(30 * bulk), names, examine)
    assert outcomes == {True, False}
