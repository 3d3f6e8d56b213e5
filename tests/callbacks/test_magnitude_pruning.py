"""MagnitudePruning under a Trainer: where masks come from, what removed weights do, what a resume brings back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DPStrategy, MagnitudePruning
from lightning_dp.masks import magnitude_masks
from tests.cases import each
from tests.helpers import Classifier, make_loader, make_trainer
from tests.step.composition.table import NoiseSpy
from tests.strategies.test_manual import GAN

PRUNABLE = ["network.0.weight", "network.2.weight"]
OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
}


def private(**options: Any) -> DPStrategy:
    defaults: dict[str, Any] = {"target_delta": 1e-3, "check_per_sample": False}
    return DPStrategy(**{"noise_multiplier": 1.0, **defaults, **options})


def weights(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Steps(L.Callback):
    """The gradient of every step, and the weights before the first and after each."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights.append(weights(pl_module))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.weights.append(weights(pl_module))

    def live(self, step: int) -> dict[str, Tensor]:
        return {name: self.gradients[step][name] != 0 for name in PRUNABLE}


def fit(
    tmp_path: Path,
    pruning: MagnitudePruning,
    module: Any = None,
    strategy: Any = None,
    ckpt: Any = None,
    **options: Any,
) -> tuple[Steps, L.LightningModule, DPStrategy, L.Trainer]:
    steps, module, strategy = Steps(), module or Classifier(), strategy or private()
    trainer = make_trainer(strategy, tmp_path, callbacks=[pruning, steps], **{"max_epochs": 2, **options})
    trainer.fit(module, make_loader(), ckpt_path=ckpt)
    return steps, module, strategy, trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["prune", "freeze"])
@pytest.mark.parametrize(("scope", "scores"), [("global", "magnitude"), ("layer", "magnitude"), ("global", "random")])
@pytest.mark.one_in(4)
def test_removed_weights_stay_and_the_others_train(
    scope: str, scores: str, mode: str, optimizer: str, tmp_path: Path
) -> None:
    """Neither momentum nor weight decay moves them; noise and gradient are on the others, biases included."""
    module = Classifier(optimizer=OPTIMIZERS[optimizer])
    initial = weights(module)
    masks = magnitude_masks(initial, 0.5, scope, PRUNABLE, scores, seed=3)
    assert sum(int((~mask).sum()) for mask in masks.values()) == (15 + 7 if scope == "layer" else 22)
    pruning = MagnitudePruning(0.5, scope=scope, scores=scores, mode=mode, seed=3)
    steps, *_ = fit(tmp_path, pruning, module, private(seed=0))  # else a rare step is too small to change a weight
    assert len(steps.gradients) == 8
    for step, seen in enumerate(steps.weights):
        for name, mask in masks.items():
            kept = initial[name] if mode == "freeze" else torch.zeros_like(mask)
            assert torch.equal(seen[name][~mask], kept[~mask])
            if step:
                assert bool((seen[name] != steps.weights[step - 1][name])[mask].all())
                assert torch.equal(steps.live(step - 1)[name], mask)
        if step:
            assert bool((steps.gradients[step - 1]["network.0.bias"] != 0).all())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("mode", ["prune", "freeze"])
@pytest.mark.one_in(2)
def test_noisy_source_scores_by_the_noisy_weights(mode: str, every: int, tmp_path: Path) -> None:
    """Dense until the first round has ended; each mask is that of the weights as they were then, and of nothing
    else.
    """
    pruning = MagnitudePruning(0.4, source="noisy", every_n_epochs=every, mode=mode)
    steps, *_ = fit(tmp_path, pruning, max_epochs=4)
    assert len(steps.gradients) == 16
    drawn = []
    for step in range(16):
        rounds = step // (4 * every)
        if rounds == 0:
            assert all(bool(live.all()) for live in steps.live(step).values())
            continue
        expected = magnitude_masks(steps.weights[rounds * 4 * every], 0.4, "global", PRUNABLE)
        drawn.append(torch.cat([mask.flatten() for mask in expected.values()]))
        for name, mask in expected.items():
            assert torch.equal(steps.live(step)[name], mask)
    assert int((~drawn[0]).sum()) == int(0.4 * 45)


def test_public_source_scores_by_the_reference(tmp_path: Path) -> None:
    torch.manual_seed(5)
    reference = {name: torch.randn_like(value) for name, value in weights(Classifier()).items()}
    steps, *_ = fit(tmp_path, MagnitudePruning(0.6, source="public", reference=reference, mode="freeze"))
    masks = magnitude_masks(reference, 0.6, "global", PRUNABLE)
    for step in range(8):
        assert all(torch.equal(steps.live(step)[name], masks[name]) for name in PRUNABLE)
    initial = weights(Classifier())
    assert all(torch.equal(steps.weights[-1][n][~masks[n]], initial[n][~masks[n]]) for n in PRUNABLE)


@pytest.mark.parametrize("options", [{"source": "initial"}, {"source": "noisy", "every_n_epochs": 1}], ids=str)
@pytest.mark.parametrize("mode", ["prune", "freeze"])
@pytest.mark.one_in(2)
def test_a_resumed_run_keeps_the_masks_and_the_frozen_values(
    mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Resumed with a module of other initial weights: masks are those of the checkpoint, not drawn again."""
    first, _, _, trainer = fit(tmp_path, MagnitudePruning(0.5, mode=mode, **options))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    other = Classifier()
    nn.init.normal_(other.network[0].weight, generator=torch.Generator().manual_seed(9))
    second, _, strategy, _ = fit(
        tmp_path, MagnitudePruning(0.5, mode=mode, **options), other, ckpt=tmp_path / "two.ckpt", max_epochs=3
    )
    assert strategy.ledger.num_steps == 12
    assert len(second.gradients) == 4
    expected = magnitude_masks(first.weights[8 if "every_n_epochs" in options else 0], 0.5, "global", PRUNABLE)
    for name, mask in expected.items():
        assert torch.equal(second.live(0)[name], mask)
        at_end = first.weights[-1][name]
        held = torch.zeros_like(at_end) if mode == "prune" else at_end
        assert torch.equal(second.weights[-1][name][~mask], held[~mask])


def test_a_new_run_draws_its_own_masks(tmp_path: Path) -> None:
    pruning = MagnitudePruning(0.5)
    first, *_ = fit(tmp_path, pruning)
    other = Classifier()
    nn.init.normal_(other.network[0].weight, generator=torch.Generator().manual_seed(9))
    expected = magnitude_masks(weights(other), 0.5, "global", PRUNABLE)
    second, *_ = fit(tmp_path, pruning, other)
    assert all(torch.equal(second.live(0)[name], expected[name]) for name in PRUNABLE)
    assert not torch.equal(first.live(0)[PRUNABLE[0]], second.live(0)[PRUNABLE[0]])


def test_pruning_keeps_the_ledger_and_noises_live_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = NoiseSpy(monkeypatch)
    *_, pruned, _ = fit(tmp_path, MagnitudePruning(0.5))
    dense = private()
    make_trainer(dense, tmp_path, max_epochs=2).fit(Classifier(), make_loader())
    assert pruned.epsilon() == dense.epsilon()
    assert [draw.before.numel() for draw in spy.draws] == [53 - 22] * 8 + [53] * 8
    assert {draw.std for draw in spy.draws} == {1.0}


def test_hooks_are_gone_after_the_run(tmp_path: Path) -> None:
    _, module, _, trainer = fit(tmp_path, MagnitudePruning(0.5))
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_post_hooks
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(bool((parameter == 1.0).all()) for parameter in module.parameters())


def test_weights_of_a_public_optimizer_are_not_pruned(tmp_path: Path) -> None:
    module, seen = GAN(), {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            seen.update({n: int((p == 0).sum()) for n, p in pl_module.named_parameters() if p.dim() > 1})

    strategy = private(public_optimizers=[0])
    make_trainer(strategy, tmp_path, callbacks=[MagnitudePruning(0.5, scope="layer"), Look()]).fit(
        module, make_loader()
    )
    for name, zeros in seen.items():
        pruned = dict(module.named_parameters())[name].numel() // 2
        assert zeros == (pruned if name.startswith("discriminator") else 0)


@each(
    "arguments, error, message",
    [
        ({"amount": 0.0}, ValueError, "0 < amount < 1"),
        ({"amount": 1.0}, ValueError, "0 < amount < 1"),
        ({"amount": float("nan")}, ValueError, "0 < amount < 1"),
        ({"source": "private"}, ValueError, "source to be one of"),
        ({"source": make_loader()}, TypeError, "source=DataLoader. Scores computed from the private data"),
        ({"scope": "row"}, ValueError, "scope to be one of"),
        ({"mode": "drop"}, ValueError, "mode to be one of"),
        ({"scores": "gradient"}, ValueError, "scores to be one of"),
        ({"scores": make_loader()}, TypeError, "scores=DataLoader. Scores computed from the private data"),
        ({"source": "noisy"}, ValueError, "every_n_epochs with source='noisy'"),
        ({"every_n_epochs": 2}, ValueError, "every_n_epochs with source='noisy'"),
        ({"source": "noisy", "every_n_epochs": 0}, ValueError, "every_n_epochs"),
        ({"source": "public"}, ValueError, "reference with source='public'"),
        ({"reference": {}}, ValueError, "reference with source='public'"),
        ({"source": "public", "reference": Classifier()}, TypeError, "reference=Classifier. Scores computed from"),
        ({"seed": -1}, ValueError, "seed >= 0"),
    ],
)
def test_pruning_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MagnitudePruning(**{"amount": 0.5, **arguments})


def test_misfit_with_the_module_is_refused_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = NoiseSpy(monkeypatch)
    with pytest.raises(ValueError, match=r"got none for 'network\.0\.weight'"):
        fit(tmp_path, MagnitudePruning(0.5, source="public", reference={}))
    module = Classifier()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("bias" in name)
    with pytest.raises(ValueError, match="trainable weights of two dimensions or more with MagnitudePruning"):
        fit(tmp_path, MagnitudePruning(0.5), module)
    *_, trainer = fit(tmp_path, MagnitudePruning(0.5), strategy=private(noise_multiplier=0.5))
    spy.draws.clear()
    trainer.save_checkpoint(tmp_path / "narrow.ckpt")
    state = torch.load(tmp_path / "narrow.ckpt", weights_only=False)
    key = next(key for key in state["callbacks"] if key.startswith("MagnitudePruning"))
    state["callbacks"][key]["mask"]["masks"]["gone"] = state["callbacks"][key]["mask"]["masks"].pop(PRUNABLE[0])
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match="masks in the checkpoint were drawn for, got none or another shape for 'gone'"
    ):
        fit(tmp_path, MagnitudePruning(0.5), ckpt=tmp_path / "other.ckpt", max_epochs=3)
    assert spy.draws == []
