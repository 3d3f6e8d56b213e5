"""Every mechanism by name, the combinations that are refused, and a Trainer run over any of the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import (
    AdaptiveClipping,
    AutomaticClipping,
    AutoThreshold,
    ClippingScheduler,
    DPStrategy,
    FlatClipping,
    MagnitudePruning,
    NoClipping,
    NoiseScheduler,
    PerLayerClipping,
    PSACClipping,
    PublishedAutoThreshold,
    RandomSparsification,
    SwitchToDP,
    TopAgg,
)
from lightning_dp.clipping import Clipping
from lightning_dp.noise import GaussianNoise
from lightning_dp.step.step import PrivateStep
from tests.helpers import NUM_CLASSES, NUM_FEATURES, Classifier, make_trainer

NUM_RECORDS = 12

CLIPPINGS: dict[str, Callable[[], Clipping]] = {
    "flat": lambda: FlatClipping(0.5),
    "per_layer": lambda: PerLayerClipping(0.5, noise="equal"),  # one draw per release, which these tests count
    "auto_s": lambda: AutomaticClipping(),
    "auto_v": lambda: AutomaticClipping(gamma=0.0),
    "auto_s_per_layer": lambda: AutomaticClipping(per_layer=True),
    "auto_v_per_layer": lambda: AutomaticClipping(gamma=0.0, per_layer=True),
    "psac": lambda: PSACClipping(),
    "psac_per_layer": lambda: PSACClipping(per_layer=True),
    "top_agg": lambda: TopAgg(0.2),
    "top_agg_plain": lambda: TopAgg(8, sign="plain", vote_threshold=0.2),
    "top_agg_values": lambda: TopAgg(0.5, keep_values=True),
    "none": lambda: NoClipping(0.5),
}
MASKS: dict[str, Callable[[], list[L.Callback]]] = {
    "dense": list,
    "sparse": lambda: [RandomSparsification(0.6, refresh=1, schedule="constant")],
    "cooling": lambda: [RandomSparsification(0.9, refresh="epoch")],
    "pruned": lambda: [MagnitudePruning(0.5)],
    "frozen": lambda: [MagnitudePruning(0.5, mode="freeze", scope="layer", scores="random")],
    "sparse_pruned": lambda: [MagnitudePruning(0.3), RandomSparsification(0.5, refresh=2, schedule="constant")],
    "repruned": lambda: [MagnitudePruning(0.4, source="noisy", every_n_epochs=1)],
}
NOISES: dict[str, Callable[[], list[L.Callback]]] = {
    "constant": list,
    "step": lambda: [NoiseScheduler("step", factor=0.8)],
    "rate": lambda: [NoiseScheduler("time", rate=0.5, interval="step")],
}
BOUNDS: dict[str, Callable[[], list[L.Callback]]] = {
    "fixed": list,
    "scheduled": lambda: [ClippingScheduler("step", factor=0.5)],
    "auto": lambda: [AutoThreshold(2.0)],
    "adaptive": lambda: [AdaptiveClipping(0.5)],
    "published": lambda: [PublishedAutoThreshold()],
}
PHASES: dict[str, Callable[[], list[L.Callback]]] = {
    "private": list,
    "to_dp": lambda: [SwitchToDP(1)],
    "from_dp": lambda: [SwitchToDP(1, reverse=True)],
}
#: What has no finite epsilon, whatever is combined with it.
UNSOUND = {"none", "published", "to_dp", "from_dp"}


@dataclass(frozen=True)
class Combination:
    """One entry of every table."""

    clipping: str = "flat"
    mask: str = "dense"
    noise: str = "constant"
    bound: str = "fixed"
    phase: str = "private"

    def __str__(self) -> str:
        return "-".join((self.clipping, self.mask, self.noise, self.bound, self.phase))

    @property
    def refusal(self) -> str:
        """The message with which it is refused; empty where it is legal."""
        if self.clipping == "none" and self.bound != "fixed":
            return "Expected a clipping with a bound"
        if self.clipping.startswith("top_agg") and self.bound == "published":
            return "Expected a clipping by a factor"
        if self.clipping in ("top_agg", "top_agg_plain") and self.bound != "fixed":
            return "no bound to scale|has no threshold|threshold|bound"
        return ""

    @property
    def is_private(self) -> bool:
        """Whether the whole run has a finite epsilon."""
        return not UNSOUND & {self.clipping, self.bound, self.phase}

    def make_callbacks(self) -> list[L.Callback]:
        """Fresh callbacks."""
        return [
            *MASKS[self.mask](),
            *NOISES[self.noise](),
            *BOUNDS[self.bound](),
            *PHASES[self.phase](),
        ]

    def make_strategy(self, **options: Any) -> DPStrategy:
        """A strategy with its clipping; predictable unless a seed is given, and quick: without the check of the first
        batch.
        """
        defaults: dict[str, Any] = {"target_delta": 1e-3, "seed": 0, "check_per_sample": False}
        if not {"noise_multiplier", "target_epsilon"} & options.keys():
            defaults["noise_multiplier"] = 2.0
        return DPStrategy(clipping=CLIPPINGS[self.clipping](), **{**defaults, **options})


def pairwise(combinations: Sequence[Combination], but: Sequence[str] = ()) -> list[Combination]:
    """A few of these in which every two names that meet in any of them meet in one; the greediest choice each time.

    Names of the fields in ``but`` need not meet others; each is in one of the combinations.
    """
    apart = {number for number, field in enumerate(fields(Combination)) if field.name in but}
    pairs = {}
    for combination in combinations:
        names = list(enumerate(astuple(combination)))
        pairs[combination] = {
            pair
            for pair in itertools.combinations_with_replacement(names, 2)
            if pair[0] == pair[1] or not apart & dict(pair).keys()
        }
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(pairs, key=lambda combination: len(pairs[combination] & missing))
        chosen.append(best)
        missing -= pairs.pop(best)
    return chosen


@dataclass
class Draw:
    """One call of the noise: what it was added to, before and after, and with which std."""

    before: Tensor
    std: float
    offset: int
    after: Tensor


class NoiseSpy:
    """Follows every draw of noise, all of it added to what is summed up already."""

    def __init__(self, monkeypatch: Any) -> None:
        self.draws: list[Draw] = []
        add = GaussianNoise.add_

        def spy(noise: GaussianNoise, tensor: Tensor, std: float) -> Tensor:
            before = tensor.clone()
            noisy = add(noise, tensor, std)
            self.draws.append(Draw(before, std, tensor.storage_offset(), tensor.clone()))
            return noisy

        monkeypatch.setattr(GaussianNoise, "add_", spy)
        monkeypatch.setattr(PrivateStep, "noise_comes_first", lambda self: False)

    @property
    def gradients(self) -> list[Draw]:
        """Draws over gradients, which are at the beginning of a release."""
        return [draw for draw in self.draws if draw.offset == 0]

    @property
    def statistics(self) -> list[Draw]:
        """Draws over statistics, which are at its end; none where there are none."""
        return [draw for draw in self.draws if draw.offset > 0]


def make_data(num_records: int = NUM_RECORDS, *, outlier: float = 0.0) -> TensorDataset:
    """Features and labels; ``outlier`` other than 0 replaces record 3 by one of that size."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_records, NUM_FEATURES, generator=generator)
    labels = features[:, :NUM_CLASSES].argmax(1)
    if outlier:
        features[3] = outlier
        labels[3] = (labels[3] + 1) % NUM_CLASSES
    return TensorDataset(features, labels)


def fit(
    combination: Combination,
    tmp_path: Any,
    *,
    data: TensorDataset | None = None,
    batch_size: int = 4,
    module: L.LightningModule | None = None,
    callbacks: list[L.Callback] | None = None,
    ckpt_path: Any = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[DPStrategy, L.LightningModule, L.Trainer]:
    """Trains a small classifier under a combination."""
    strategy = combination.make_strategy(**options)
    trainer = make_trainer(
        strategy,
        tmp_path,
        callbacks=[*combination.make_callbacks(), *(callbacks or [])],
        **{"max_epochs": 2, **(trainer_options or {})},
    )
    module = module or Classifier()
    loader = DataLoader(data or make_data(), batch_size=batch_size, shuffle=True)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return strategy, module, trainer


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])
