"""Bad input in bulk: any arguments, data and modules are trained with an exact ledger, or refused in our words.

Every example either runs, and then the ledger holds one entry for each gradient that a hook could see, at the noise and
the rate that arithmetic says; or it raises one of our errors, ``Expected ..., got ...``, and nothing was released
before it.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_dp import DPDDPStrategy, DPStrategy, PrivacyError
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from tests.helpers import Classifier, Recorder, make_loader, make_trainer

FORMAT = re.compile(r"Expected .+ got .+\.", re.DOTALL)
FEATURES = 3
BULK = [pytest.param(0.3, id="few"), pytest.param(4, id="many", marks=pytest.mark.slow)]


def try_examples(number: int, strategy: st.SearchStrategy[Any], examine: Callable[[Any], None]) -> None:
    """The same examples every time; no deadline, since the first one pays for imports."""
    options = settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    options(given(strategy)(examine))()


def in_our_words(attempt: Callable[[], Any]) -> Any:
    """What it returns, or None where it was refused; another error than ours fails the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return attempt()
    except (ValueError, TypeError, PrivacyError) as error:
        if not FORMAT.match(str(error)):
            raise
        return None


def check_run(folder: Any, strategy: DPStrategy, module: L.LightningModule, loader: Any, **options: Any) -> bool:
    """Fits three steps at most; returns whether it ran. What was released is in the ledger, at the noise that was asked
    for.
    """
    recorder = Recorder()
    sigma = strategy.settings.noise_multiplier

    def fit() -> bool:
        make_trainer(strategy, folder, callbacks=[recorder], max_steps=3, max_epochs=3, **options).fit(module, loader)
        return True

    ran = in_our_words(fit)
    assert strategy.ledger.num_steps == len(recorder.before_step)
    if not ran:
        assert not recorder.before_step
        return False
    expected_batch = loader.batch_size * options.get("accumulate_grad_batches", 1)
    assert strategy.plan.expected_batch_size == expected_batch
    for run in strategy.ledger.entries:
        if run.event.kind == "poisson":
            assert run.event.sample_rate == expected_batch / len(loader.dataset)
        if run.event.kind != "non_private" and sigma is not None:
            assert run.event.noise_multiplier == pytest.approx(sigma)
    return True


# ---------------------------------------------------------------- arguments

JUNK = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    0.5,
    -0.5,
    1e-300,
    1e300,
    10**400,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "flat",
    b"x",
]
JUNK += [
    [],
    {},
    (),
    object(),
    np.float64(0.5),
    np.array([1.0, 2.0]),
    torch.tensor(1.0),
    torch.tensor([1.0, 2.0]),
    print,
]
USUAL: dict[str, list[Any]] = {
    "noise_multiplier": [0.0, 1.0, 2],
    "target_epsilon": [2.0, 0.1],
    "target_delta": [1e-3, 1e-6],
    "max_grad_norm": [1.0, 3],
    "clipping": ["flat", "per_layer", "automatic", "none"],
    "accountant": ["rdp", "gdp"],
    "sampling": ["poisson", "shuffle"],
    "microbatch_size": [1, 5, 10**6],
    "grad_sample": ["auto", "materialize"],
    "neighboring_relation": ["add_or_remove_one", "replace_one", "zero_out"],
    "memory": ["fast", "lean"],
    "check_per_sample": [True, False],
    "secure_rng": [True, False],
    "seed": [0, 10**30],
    "loss_reduction": ["auto", "mean", "sum"],
    "public_optimizers": [(), (0,), (1,)],
    "strict_logging": [True, False],
}
#: arguments as a user gives them: the usual ones, and now and then one that is something else
ARGUMENTS = st.fixed_dictionaries(
    {"noise_multiplier": st.sampled_from([1.0] * 8 + USUAL["noise_multiplier"] + JUNK)},
    optional={name: st.sampled_from(usual * 12 + JUNK) for name, usual in USUAL.items() if name != "noise_multiplier"},
)


@pytest.mark.parametrize("bulk", BULK)
def test_any_arguments_are_taken_or_refused_with_a_message(tmp_path: Any, bulk: float) -> None:
    """What is taken trains, and its epsilon is that of a ledger written by hand."""
    ran: list[bool] = []

    def examine(arguments: dict[str, Any]) -> None:
        if "target_epsilon" in arguments and arguments["target_epsilon"] is not None:
            arguments = {**arguments, "noise_multiplier": None}
        strategy = in_our_words(lambda: DPStrategy(**{"accountant": "rdp", **arguments}))
        assert (in_our_words(lambda: DPDDPStrategy(**{"accountant": "rdp", **arguments})) is None) == (strategy is None)
        if strategy is None:
            return
        took = check_run(tmp_path, strategy, Classifier(), make_loader())
        ran.append(took)
        if took:
            check_epsilon(strategy)

    try_examples(max(15, int(30 * bulk)), ARGUMENTS, examine)  # fewer hardly train
    assert ran.count(True) >= 3


def check_epsilon(strategy: DPStrategy) -> None:
    chosen, ledger = strategy.settings, Ledger(strategy.settings.neighboring_relation)
    sigma = strategy.plan.noise_multiplier
    if chosen.clipping == "none" or sigma == 0:
        assert strategy.epsilon() == math.inf
        return
    rate = {"sample_rate": 0.25} if chosen.sampling == "poisson" else {}
    ledger.record(PrivacyEvent(kind=chosen.sampling, noise_multiplier=sigma, **rate), 3)
    assert strategy.epsilon() == pytest.approx(make_accountant(chosen.accountant).epsilon(ledger, strategy.plan.delta))
    if chosen.target_epsilon is not None:
        assert strategy.epsilon() <= chosen.target_epsilon


@pytest.mark.parametrize("name", USUAL)
def test_each_argument_alone_refuses_what_it_cannot_be(name: str) -> None:
    """Every odd value for every argument: taken or refused, never another error; and every usual one is taken."""
    others = {} if name == "target_epsilon" else {"noise_multiplier": 1.0}
    for value in USUAL[name] + JUNK:
        strategy = in_our_words(lambda value=value: DPStrategy(**{**others, name: value}))
        usual = any(value is known for known in USUAL[name])
        assert not usual or strategy is not None


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
