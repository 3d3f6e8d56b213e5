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

from lightning_dp import DPDDPStrategy, DPStrategy, PrivacyError
from lightning_dp.accounting import Ledger, PrivacyEvent, make_accountant
from tests.cases import each
from tests.helpers import Classifier, Recorder, make_loader, make_trainer

FORMAT = re.compile(r"Expected .+ got .+\.", re.DOTALL)
BULK = [pytest.param(0.3, id="few"), pytest.param(1.2, id="many", marks=pytest.mark.slow)]


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


@each("name", USUAL)
def test_each_argument_alone_refuses_what_it_cannot_be(name: str) -> None:
    """Every odd value for every argument: taken or refused, never another error; and every usual one is taken."""
    others = {} if name == "target_epsilon" else {"noise_multiplier": 1.0}
    for value in USUAL[name] + JUNK:
        strategy = in_our_words(lambda value=value: DPStrategy(**{**others, name: value}))
        usual = any(value is known for known in USUAL[name])
        assert not usual or strategy is not None
