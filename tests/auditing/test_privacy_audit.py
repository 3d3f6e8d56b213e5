"""The callback in whole runs: sound builds stay below their claim and close to it, and say what they found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from scipy.special import ndtr
from scipy.stats import binom

from lightning_dp import DPStrategy, PerLayerClipping, PrivacyAudit, PrivacyError, RandomSparsification, TopAgg
from lightning_dp.accounting import gaussian_epsilon
from lightning_dp.auditing.estimates import clopper_pearson_upper
from lightning_dp.clipping import Clipping
from lightning_dp.reporting.notes import RunNotes
from tests.auditing.models import ALMOST_SURE, DELTA, Idle, Overfitting, audited, zeros_loader
from tests.helpers import Classifier, Recorder, make_loader, make_trainer
from tests.processes import run_two_ranks
from tests.strategies.test_manual import Manual, TwoOptimizers


def lower_bound(right: int, canaries: int = 1000) -> float:
    """The bound of an unsampled run as a function of right guesses alone: half of half of 1e-5 a rule."""
    wrong = clopper_pearson_upper(canaries - right, canaries, (1 - ALMOST_SURE) / 4)
    return gaussian_epsilon(max(0.0, -2 * math.sqrt(2) * torch.erfinv(torch.tensor(2 * wrong - 1)).item()), DELTA)


def test_audit_of_the_sound_build_is_near_its_claim(tmp_path: Path) -> None:
    """Worst case (gradient space, white box), q = 1, mu = 2, 1,000 canaries: right guesses are Bin(1000, Phi(1)).

    From that distribution: P[bound < 0.3 claim] < 1e-12, and P[bound > claim] <= 1e-5 by the bound's own confidence.
    """
    few = max(v for v in range(500, 1000) if lower_bound(v) < 0.3 * gaussian_epsilon(2.0, DELTA))
    assert binom.cdf(few, 1000, ndtr(1.0)) < 1e-12
    audit, strategy = audited(tmp_path)
    result = audit.result
    assert result is not None
    assert result.claimed_epsilon == strategy.epsilon() == pytest.approx(gaussian_epsilon(2.0, DELTA), rel=1e-6)
    assert 0.3 * result.claimed_epsilon <= result.epsilon_lower <= result.claimed_epsilon
    assert result.epsilon_lower == result.epsilon_gdp
    assert not result.refutes_claim


def test_the_sound_build_under_sampling(tmp_path: Path) -> None:
    """Q = 1/4, sigma 1, 12 steps, 2,000 canaries: above claim with probability <= 1e-5; 0.3 is 8 standard errors
    away.
    """
    audit, _ = audited(tmp_path, num_canaries=2000, noise_multiplier=1.0, batch_size=16, epochs=3)
    assert audit.result is not None
    assert 0.3 * audit.result.claimed_epsilon <= audit.result.epsilon_lower <= audit.result.claimed_epsilon


def test_what_is_logged_and_stated(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    audit, strategy = audited(tmp_path, num_canaries=100, epochs=2, logger=logger)
    assert audit.result is not None
    metrics = strategy.trainer.callback_metrics
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    logged = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    expected = {
        "audit/epsilon_lower": audit.result.epsilon_lower,
        "audit/epsilon": strategy.epsilon(),
        "audit/delta": DELTA,
        "audit/confidence": ALMOST_SURE,
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value)
        assert float(logged[name]) == pytest.approx(value)
    statement = strategy.privacy_statement()
    assert "audited with 100 gradient canaries: epsilon >= " in statement
    assert f"at delta 1e-05 with confidence {ALMOST_SURE:g} (claimed: " in statement
    assert RunNotes.from_state_dict(strategy.notes.state_dict()).audits == (audit.result.describe(),)


def test_real_records_enter_the_sum_as_they_do_without_canaries(tmp_path: Path) -> None:
    """Without noise: the gradients with and without an audit differ by the canaries' coordinates and by nothing
    else.
    """
    seen: list[dict[str, torch.Tensor]] = []
    for callbacks in ([], [PrivacyAudit(1000)]):
        recorder = Recorder()
        strategy = DPStrategy(noise_multiplier=0.0, check_per_sample=False)
        trainer = make_trainer(strategy, tmp_path, callbacks=[*callbacks, recorder])
        torch.manual_seed(3)
        trainer.fit(Idle(4000, lr=0.0), make_loader(batch_size=64))
        seen.append(recorder.before_step[0])
    difference = torch.cat([(seen[1][name] - seen[0][name]).flatten() for name in seen[0]]) * 64
    moved = difference[difference.abs() > 1e-4].abs()
    assert 350 < len(moved) < 650  # Bin(1000, 1/2): 9 standard errors
    torch.testing.assert_close(moved, torch.ones_like(moved), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clipping", [PerLayerClipping(noise="equal"), "automatic"])
def test_other_clippings(tmp_path: Path, clipping: str | Clipping) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=DELTA, clipping=clipping, check_per_sample=False)
    audit, _ = audited(tmp_path, strategy=strategy, epochs=4)
    assert audit.result is not None
    assert audit.result.epsilon_lower <= audit.result.claimed_epsilon
    if clipping == "automatic":  # under per-layer bounds a canary fits into one group of three: it is shorter
        assert audit.result.epsilon_lower > 0.3 * audit.result.claimed_epsilon


def test_two_private_optimizers_and_a_mask(tmp_path: Path) -> None:
    strategy = DPStrategy(noise_multiplier=1.0, target_delta=DELTA, check_per_sample=False)
    audit, _ = audited(tmp_path, num_canaries=15, strategy=strategy, epochs=4, module=TwoOptimizers())
    assert audit.result is not None
    assert audit.result.epsilon_lower <= audit.result.claimed_epsilon
    masked, _ = audited(tmp_path, epochs=4, module=Idle(3000), callbacks=[RandomSparsification(final_rate=0.5)])
    assert masked.result is not None
    assert masked.result.epsilon_lower <= masked.result.claimed_epsilon


def test_a_resumed_run_keeps_its_coins_and_its_scores(tmp_path: Path) -> None:
    audit, strategy = audited(tmp_path, num_canaries=300, epochs=4)
    strategy.trainer.save_checkpoint(tmp_path / "four.ckpt")
    assert audit._gradients is not None
    before = audit._gradients.scores
    again = PrivacyAudit(300)
    trainer = make_trainer(
        DPStrategy(noise_multiplier=2.0, target_delta=DELTA), tmp_path, max_epochs=5, callbacks=[again]
    )
    trainer.fit(Idle(300), make_loader(batch_size=64), ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    assert (again.included == audit.included).all()
    assert again._gradients is not None
    change = again._gradients.scores - before  # one release of mu 1/2: N(+-1/8, 1/4); false alarm 300 x 4e-8 a side
    assert 0 < abs(change).max() < 1 / 8 + 5.5 / 2
    other = PrivacyAudit(200)
    trainer = make_trainer(DPStrategy(noise_multiplier=2.0), tmp_path, max_epochs=5, callbacks=[other])
    with pytest.raises(PrivacyError, match="Expected the canaries of the run being resumed, got 200 others"):
        trainer.fit(Idle(300), make_loader(batch_size=64), ckpt_path=tmp_path / "four.ckpt", weights_only=True)


def input_canaries(num: int) -> list[Any]:
    """One record a direction of its own: its target is learned if and only if it is in."""
    return [(torch.nn.functional.one_hot(torch.tensor(i), num).float(), torch.tensor(1.0)) for i in range(num)]


def test_memorised_input_canaries_refute_a_claim_of_zero(tmp_path: Path) -> None:
    """Hardly any noise, 400 canaries of their own directions: every coin is guessed, so the bound is that of 400 out of
    400.
    """
    audit = PrivacyAudit(canaries=input_canaries(400), confidence=0.95)
    strategy = DPStrategy(noise_multiplier=1e-3, target_delta=1e-7, accountant="rdp")
    trainer = make_trainer(strategy, tmp_path, max_epochs=6, callbacks=[audit])
    trainer.fit(Overfitting(400, lr=100.0), zeros_loader(600, 400))  # 600 records and canaries, batches of 600: q < 1
    assert strategy.plan.dataset_size == 600 + int(audit.included.sum())
    result = audit.result
    assert result is not None
    assert (result.kind, result.num_canaries, result.epsilon_gdp) == ("input", 400, None)
    assert result.epsilon_lower > 2.0
    assert result.epsilon_lower <= result.claimed_epsilon


def test_resumed_run_trains_on_the_canaries_of_before(tmp_path: Path) -> None:
    """Coins are flipped at each setup, before a checkpoint brings those that count."""

    def fit(epochs: int, ckpt_path: Path | None) -> tuple[PrivacyAudit, set[int]]:
        audit, trained = PrivacyAudit(canaries=input_canaries(40)), set()

        class Watching(Overfitting):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if self.training:
                    trained.update(batch[0].argmax(1)[batch[1] > 0].tolist())
                return super().training_step(batch, batch_idx)

        strategy = DPStrategy(noise_multiplier=1.0, target_delta=1e-3, check_per_sample=False)
        trainer = make_trainer(strategy, tmp_path, max_epochs=epochs, callbacks=[audit])
        trainer.fit(Watching(40, lr=0.1), zeros_loader(60, 40), ckpt_path=ckpt_path, weights_only=True)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return audit, trained

    first, _ = fit(1, None)
    again, trained = fit(12, tmp_path / "last.ckpt")
    joined = set(torch.from_numpy(again.included).nonzero().squeeze(1).tolist())
    assert (again.included == first.included).all()  # by chance: 2^-40
    assert trained <= joined
    assert len(trained) > 0.9 * len(joined)  # left out of at least 11 batches with q = 3/4: 2e-7 each


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected num_canaries or canaries"):
        PrivacyAudit(10, canaries=[1, 2])
    with pytest.raises(ValueError, match="Expected num_canaries >= 2"):
        PrivacyAudit(1)
    with pytest.raises(ValueError, match="Expected 0 < confidence < 1"):
        PrivacyAudit(confidence=float("nan"))
    with pytest.raises(ValueError, match="Expected 0 < norm < inf"):
        PrivacyAudit(norm=0.0)

    def fit(callbacks: Any, module: Any = None, **options: Any) -> None:
        strategy = DPStrategy(noise_multiplier=1.0, **options)
        make_trainer(strategy, tmp_path, callbacks=callbacks).fit(module or Classifier(), make_loader())

    with pytest.raises(ValueError, match=r"got sampling='shuffle'\. They are sampled as records are"):
        fit([PrivacyAudit(10)], sampling="shuffle")
    with pytest.raises(ValueError, match="Expected a clipping by a factor with canaries in gradient space"):
        fit([PrivacyAudit(10)], clipping=TopAgg(k=3))
    with pytest.raises(ValueError, match="Expected num_canaries of at most 53"):
        fit([PrivacyAudit(54)])
    with pytest.raises(ValueError, match="Expected a loss for canaries in input space under manual optimization"):
        fit([PrivacyAudit(canaries=[1, 2])], Manual())
    with pytest.raises(TypeError, match="with PrivacyAudit, got SingleDeviceStrategy"):
        make_trainer("auto", tmp_path, callbacks=[PrivacyAudit(10)]).fit(Classifier(), make_loader())


@pytest.mark.slow
def test_two_processes_share_coins_and_find_one_result(tmp_path_factory: pytest.TempPathFactory) -> None:
    ranks = run_two_ranks(Path(__file__).with_name("ddp_run.py"), tmp_path_factory)
    assert ranks[0] == ranks[1]
    result = ranks[0]["result"]
    assert 0.3 * result.claimed_epsilon <= result.epsilon_lower <= result.claimed_epsilon
