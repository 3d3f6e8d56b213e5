"""A lower confidence bound on epsilon from the run itself, to compare with the claimed epsilon."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from lightning_dp import _validate as check
from lightning_dp.auditing import AuditResult, GradientCanaries, audit
from lightning_dp.auditing.canaries import coins
from lightning_dp.callbacks._strategy import PrivateStrategy, private_strategy, write_to_loggers
from lightning_dp.errors import PrivacyError

Loss = Callable[[pl.LightningModule, Any], Tensor]


class PrivacyAudit(Callback):
    """An audit of a private run while it trains: canaries in the run give a lower bound on epsilon.

        coin_j includes canary j;   score_j is computed from the releases;   the coins are guessed from the scores

    Many right guesses refute small epsilons. In gradient space (the default), canaries are long gradients in separate
    coordinates, clipped and added as samples' gradients are. Their score is the log likelihood ratio of inner products
    with every noisy gradient, the worst case. In input space (``canaries``), canaries are records that join the
    training set, and their score is the decrease of their loss. At the end of fit, ``audit/epsilon_lower``,
    ``audit/epsilon`` (the claim), ``audit/delta`` and ``audit/confidence`` go to the loggers and to
    ``trainer.callback_metrics``. ``result`` and the privacy statement hold the result.

    **Guarantee**: ``epsilon_lower`` exceeds a true claim with probability at most ``1 - confidence``. A bound below the
    claim proves nothing, because another attack may find more. The claim still holds for every real record: canaries
    are public additional records, a real record moves the sums as before, and logged values are computed from releases
    and coins alone. Canaries cost accuracy: audit a separate run, or use few of them.

    Args:
        num_canaries: m >= 2 canaries in gradient space; 1000 unless ``canaries`` are given.
        canaries: records for an audit in input space, like the training set's but NOT in it (see
            ``lightning_dp.auditing.random_records`` and ``mislabelled``). About half of them join the training set and
            count in its size.
        confidence: in (0, 1).
        norm: length of a gradient canary before clipping, in units of the sensitivity.
        loss: (module, batch) -> loss of a batch of one canary, for input space; default: the ``training_step`` loss.

    Raises:
        ValueError: arguments out of range; gradient canaries with ``TopAgg``, with noise="least", or without Poisson
            sampling; input canaries without ``loss`` under manual optimization.
        TypeError: the Trainer's strategy is not a private one.

    Example:
        >>> callback = PrivacyAudit(num_canaries=500, confidence=0.99)

    References:
        Steinke, Nasr and Jagielski 2023, Privacy Auditing with One (1) Training Run.
        Nasr et al. 2023, Tight Auditing of Differentially Private Machine Learning.
    """

    def __init__(
        self,
        num_canaries: int | None = None,
        *,
        canaries: Sequence[Any] | None = None,
        confidence: float = 0.95,
        norm: float = 10.0,
        loss: Loss | None = None,
    ) -> None:
        if num_canaries is not None and canaries is not None:
            raise ValueError(
                f"Expected num_canaries or canaries, got num_canaries={num_canaries} and {len(canaries)} canaries. "
                "Pass one of them."
            )
        wanted = len(canaries) if canaries is not None else 1000 if num_canaries is None else num_canaries
        if check.check_count("num_canaries", wanted) < 2:
            raise ValueError(
                f"Expected num_canaries >= 2, got num_canaries={wanted}. One coin shows nothing: pass more."
            )
        self.num_canaries = wanted
        self.confidence = check.check_probability("confidence", confidence)
        self.norm = check.check_positive("norm", norm)
        self.result: AuditResult | None = None
        self._records = canaries
        self._loss = loss or _training_loss
        self._gradients: GradientCanaries | None = None
        self._root = ""
        self._losses_before: list[float] = []

    # ---------------------------------------------------------------- before the run

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Flip the coins when fit begins, the same on every rank, and pass the canaries to the strategy."""
        if stage != "fit":
            return
        strategy = private_strategy(trainer, self)
        if self._records is None and strategy.settings.sampling != "poisson":
            raise ValueError(
                "Expected sampling='poisson' with canaries in gradient space, got "
                f"sampling={strategy.settings.sampling!r}. They are sampled as records are: pass sampling='poisson', "
                "or records as PrivacyAudit(canaries=...)."
            )
        if self._records is not None and self._loss is _training_loss and not pl_module.automatic_optimization:
            raise ValueError(
                "Expected a loss for canaries in input space under manual optimization, got loss=None. training_step "
                "would step the optimizers: pass PrivacyAudit(loss=lambda module, batch: ...)."
            )
        self.result, self._losses_before = None, []
        self._root = strategy.broadcast(secrets.token_hex(32))
        if self._records is None:
            self._gradients = GradientCanaries(self.num_canaries, norm=self.norm, root=self._root)
            strategy.mechanisms.add(self, canaries=self._gradients)
        else:
            strategy.mechanisms.add(self, extra_records=self._joining)

    def _joining(self) -> list[Any]:
        """Return the included canary records; called only when data is set up, after a resumed run has its coins."""
        assert self._records is not None
        return [record for record, joins in zip(self._records, self.included, strict=True) if joins]

    @property
    def included(self) -> NDArray[np.bool_]:
        """Flags of the included canaries, shape (m,). Public."""
        if self._gradients is not None:
            return self._gradients.included
        return coins(self.num_canaries, self._root)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the canaries' coordinates when training begins, or compute their initial losses."""
        strategy = private_strategy(trainer, self)
        if self._gradients is not None:
            for index, sums in strategy.accumulators.items():
                self._gradients.place(index, sums)
        elif not self._losses_before:
            self._losses_before = self._losses(strategy)

    # ---------------------------------------------------------------- after the run

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Guess the coins when training ends, and add the bounds to the loggers and the privacy statement."""
        strategy = private_strategy(trainer, self)
        if strategy.ledger.num_steps == 0:
            return
        delta, claimed = strategy.plan.delta, strategy.epsilon()
        self.result = audit(
            self._scores(strategy),
            self.included,
            ledger=strategy.ledger,
            claimed_epsilon=claimed,
            delta=delta,
            kind="input" if self._gradients is None else "gradient",
            confidence=self.confidence,
        )
        strategy.audits.append(self.result.describe())
        rank_zero_info(f"Privacy: {self.result.describe()}.")
        values = {
            "audit/epsilon_lower": self.result.epsilon_lower,
            "audit/epsilon": claimed,
            "audit/delta": delta,
            "audit/confidence": self.confidence,
        }
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})
        write_to_loggers(trainer, values)

    def _scores(self, strategy: PrivateStrategy) -> NDArray[np.float64]:
        if self._gradients is not None:
            return self._gradients.scores
        fallen = np.array(self._losses_before) - np.array(self._losses(strategy))
        return np.where(np.isfinite(fallen), fallen, -np.inf)

    def _losses(self, strategy: PrivateStrategy) -> list[float]:
        assert self._records is not None
        return strategy.losses(self._records, self._loss)

    # ---------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return coins, scores and initial losses; later batches draw their canaries from fresh entropy."""
        gradients = None if self._gradients is None else self._gradients.state_dict()
        return {"root": self._root, "gradients": gradients, "losses_before": self._losses_before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore coins, scores and losses when a run resumes, so that the same canaries are included."""
        gradients = state_dict["gradients"]
        same = len(gradients["scores"]) == self.num_canaries if gradients is not None else True
        if (gradients is None) != (self._gradients is None) or not same:
            raise PrivacyError(
                f"Expected the canaries of the run being resumed, got {self.num_canaries} others. Coins are flipped "
                "once a run: pass the same PrivacyAudit, or leave it out."
            )
        self._root, self._losses_before = state_dict["root"], list(state_dict["losses_before"])
        if gradients is not None:
            assert self._gradients is not None
            self._gradients.load_state_dict(gradients)  # in place: the strategy holds this object


def _training_loss(module: pl.LightningModule, batch: Any) -> Tensor:
    """Return the loss of ``training_step`` for a batch of one record."""
    output = module.training_step(batch, 0)
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"Expected training_step to return a loss for a canary, got {type(loss).__name__}. Pass "
            "PrivacyAudit(loss=...)."
        )
    return loss.mean()
