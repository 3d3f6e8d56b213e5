"""The DataLens LightningModule: read ``training_step`` first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp.datalens import statement, trainer_checks
from lightning_dp.datalens.run import DataLensRun
from lightning_dp.datalens.samples import write_csv, write_tensors
from lightning_dp.datalens.settings import DataLensSettings
from lightning_dp.datalens.shards import partition, public_generator, read_shards
from lightning_dp.datalens.teachers import Teachers, check_discriminator
from lightning_dp.datalens.votes import threshold_votes
from lightning_dp.step.history import of_first_rank

_STEP, _PRETRAINING, _COINS = 2, 3, 4  # what public randomness is drawn for
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class DataLens(DataLensRun):
    """A private generator, trained by the noisy votes of discriminators that each see their own shard of the data.

    In each step, every teacher takes ``d_steps`` Adam updates on its shard and the generator's samples. Then all
    teachers vote on B new samples ``x = G(z, y)``:

        s = sum_i v_i + N(0, sigma^2 I),   u = sign(s) where |s| > threshold x N, else 0

    Here ``v_i`` holds the signs of the k coordinates of largest magnitude of teacher i's ``-d/dx BCE(D_i(x, y), 1)``.
    The generator takes one optimizer step on ``MSE(G(z, y), x + alpha u)``.

    Train it with a plain ``Trainer`` (one device, or ``strategy="ddp"`` with the teachers split over the ranks) on any
    map-style dataset of ``(features, label)``. ``EpsilonMonitor``, ``PrivacyBudget`` and checkpoints work as with
    ``DPStrategy``. Of the loader, only its dataset, collate function and length are used, not its batches: see
    ``StepsOver``.

    **Guarantee**: the generator, all its samples and all that this class logs are (epsilon, delta)-differentially
    private at ``epsilon(delta)`` under replacing one record: this changes one shard, so one teacher, so the vote sums
    of a step by at most ``2 sqrt(k B)``. Each step is one Gaussian release without sampling, and exact accounting gives
    ``mu^2 = steps x 4 k B / sigma^2``. No ``state_dict``, checkpoint or pickle contains teachers or shards. NOT
    covered: validation data, and choices made by looking at the private data.

    Args:
        generator: ``generator(z, labels)`` -> samples of the shape of one record's features. Its weights are released.
        discriminator: ``discriminator(features, labels)`` -> one logit per sample; a template without BatchNorm.
        num_teachers: N, teachers with one shard of the data each. More teachers outweigh the noise, but each sees fewer
            records.
        top_k: k, votes of a teacher on one sample, from 1 to the number of features.
        sigma: standard deviation of the noise on each sum of votes, >= 0. Exactly one of this and ``target_epsilon``.
        threshold: beta in [0, 1), the fraction of the teachers that a noisy sum must exceed.
        target_epsilon: epsilon of the whole planned run; sigma is chosen to end at it or just below.
        target_delta: delta in (0, 1); default: 1 / (10 x records) rounded down to a power of ten.
        z_dim: coordinates of z ~ U(-1, 1).
        num_classes: number of labels 0, 1, ..., which are generated uniformly; 1 for data without labels.
        batch_size: B, generated samples per step; epsilon grows with it.
        alpha: step length of a sample along its direction u.
        lr: learning rate of the generator's Adam.
        teacher_lr: learning rate of the teachers' Adam.
        betas: betas of both Adam optimizers.
        d_steps: updates of each teacher before each vote.
        pretrain_steps: updates of each teacher when a fit begins.
        signs: "sign", or "stochastic" (random and unbiased).
        teacher_batch_size: records of its shard, and number of generated samples, for one update of a teacher.
        teacher_chunk_size: teachers computed at once; bounds the memory of activations and gradients. No effect on
            results with "sign".
        accountant: "gdp" (exact), "pld", "rdp", "prv" or "tcdp".
        public_seed: seed of shards, initial teachers, z and labels; may be known to everyone.
        secure_rng: draw the noise from a cryptographic generator.
        seed: for tests only: makes the noise predictable, so nothing is private from those who know it.
        optimizer: function from the generator's parameters to its optimizer; default: Adam.

    Raises:
        ValueError: for arguments out of range.
        TypeError: for arguments of the wrong kind.

    Example:
        >>> from lightning_dp.datalens import MLPDiscriminator, MLPGenerator
        >>> generator, discriminator = MLPGenerator(4, 2), MLPDiscriminator(2)
        >>> model = DataLens(generator, discriminator, num_teachers=500, top_k=1, target_epsilon=1.0, z_dim=4)
        >>> features, labels = model.generate(3)
        >>> features.shape
        torch.Size([3, 2])

    References:
        Wang et al. 2021, DataLens: Scalable Privacy Preserving Training via Gradient Compression and Aggregation.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        num_teachers: int,
        top_k: int,
        sigma: float | None = None,
        threshold: float = 0.0,
        *,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        z_dim: int = 50,
        num_classes: int = 1,
        batch_size: int = 30,
        alpha: float = 1e-3,
        lr: float = 1e-3,
        teacher_lr: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        d_steps: int = 2,
        pretrain_steps: int = 10,
        signs: str = "sign",
        teacher_batch_size: int = 30,
        teacher_chunk_size: int = 512,
        accountant: str = "gdp",
        public_seed: int = 0,
        secure_rng: bool = False,
        seed: int | None = None,
        optimizer: MakeOptimizer | None = None,
    ) -> None:
        given = locals()
        super().__init__(DataLensSettings(**{each.name: given[each.name] for each in fields(DataLensSettings)}))
        self.save_hyperparameters(ignore=["generator", "discriminator", "optimizer", "seed"])
        check_discriminator(discriminator)
        self.automatic_optimization = False
        self.generator = generator
        self._template = (discriminator,)  # in a tuple, so that it is no submodule
        self._make_optimizer = optimizer

    # ---------------------------------------------------------------- one step, as the data sees it

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Train the teachers, release their noisy votes, and step the generator. The batch is ignored."""
        settings, plan, public = self.settings, self.plan, self._public(_STEP)
        self._teach(settings.d_steps, public)

        z, labels = self._draw(settings.batch_size, public)
        samples = self.generator(z, labels).float()
        direction = threshold_votes(self._noisy_votes(samples, labels), settings.threshold * settings.num_teachers)
        self.state.step += 1

        target = samples.detach() + settings.alpha * direction.view_as(samples)  # post-processing from here on
        loss = F.mse_loss(samples, target)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("datalens/agreed", direction.abs().mean(), batch_size=plan.batch_size)

    def _teach(self, num_updates: int, public: torch.Generator) -> None:
        """Train each teacher to distinguish its shard from the generator's samples."""
        assert self._teachers is not None
        num_records = min(self.settings.teacher_batch_size, self.plan.shard_size)
        for _ in range(num_updates):
            z, labels = self._draw(num_records, public)
            positions = torch.randperm(self.plan.shard_size, generator=public)[:num_records].to(self.device)
            with torch.no_grad():
                fakes = self.generator(z, labels).float()
            self._teachers.learn(fakes, labels, positions)

    def _noisy_votes(self, samples: Tensor, labels: Tensor) -> Tensor:
        """Return the noisy sums of the votes on these samples, over the teachers of all ranks: shape (B, D)."""
        assert self._teachers is not None
        assert self._release is not None
        sums = self._teachers.sum_of_votes(
            samples,
            labels,
            self.settings.top_k,
            signs=self.settings.signs,
            generator=self._public(_COINS, self.global_rank),
        )
        return self._release(
            sums,
            plan=self.plan,
            ledger=self.ledger,
            accountant=self.accountant,
            step=self.state.step,
            last_allowed_step=self.last_allowed_step,
            sum_over_ranks=dist.all_reduce if self._release.world_size > 1 else None,
        )

    def _public(self, purpose: int, *more: int) -> torch.Generator:
        """Return this step's generator of public randomness, the same on every rank unless ``more`` holds the rank."""
        return public_generator(self.settings.public_seed, purpose, self.state.step, *more)

    def _draw(self, num: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        z = torch.rand(num, self.settings.z_dim, generator=generator) * 2 - 1
        labels = torch.randint(self.settings.num_classes, (num,), generator=generator)
        return z.to(self.device), labels.to(self.device)

    @override
    def configure_optimizers(self) -> Optimizer:
        """Return the generator's optimizer; the teachers' optimizers are hidden from Lightning."""
        if self._make_optimizer is not None:
            return self._make_optimizer(self.generator.parameters())
        return torch.optim.Adam(self.generator.parameters(), lr=self.settings.lr, betas=self.settings.betas)

    # ---------------------------------------------------------------- what is released

    @torch.no_grad()
    def generate(
        self, num: int, labels: Tensor | int | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw samples from the generator; they are as private as its weights.

        Args:
            num: number of samples, >= 1.
            labels: one label for all samples, or labels of shape (num,); default: drawn uniformly.
            generator: draws z and labels, on the CPU; default: torch's.

        Returns:
            Features of shape (num, ...) and labels of shape (num,), on the module's device.

        Raises:
            ValueError: another number of labels, or labels out of range.
        """
        z, drawn = self._draw(num, generator)
        if labels is not None:
            given = torch.as_tensor(labels).to(self.device).long()
            drawn = given.expand(num).clone() if given.dim() == 0 else given
            if drawn.shape != (num,) or not bool(((drawn >= 0) & (drawn < self.settings.num_classes)).all()):
                raise ValueError(
                    f"Expected {num} labels from 0 to {self.settings.num_classes - 1}, got labels={labels!r}. "
                    "Pass one label for all samples, or one per sample."
                )
        was_training = self.generator.training
        self.generator.eval()
        pairs = zip(torch.split(z, 1024), torch.split(drawn, 1024), strict=True)
        parts = [self.generator(*pair).float() for pair in pairs]
        self.generator.train(was_training)
        return torch.cat(parts), drawn

    def save_samples(self, path: str | Path, num: int, labels: Tensor | int | None = None, **csv_options: Any) -> None:
        """Generate samples and write them to a file: with ``write_csv`` if it ends in ``.csv``, else as tensors."""
        features, drawn = self.generate(num, labels)
        if Path(path).suffix == ".csv":
            write_csv(path, features, drawn if self.settings.num_classes > 1 else None, **csv_options)
        else:
            write_tensors(path, features, drawn)

    # ---------------------------------------------------------------- set up and tear down

    @override
    def on_train_start(self) -> None:
        """Read this rank's shards and pretrain its teachers."""
        settings, world_size = self.settings, self.trainer.world_size
        self._tuning.start(on_cpu=self.device.type == "cpu")
        if world_size > 1:
            self.state.ledger = of_first_rank(self.ledger, self.trainer.strategy.broadcast(self.ledger.state_dict()))
        numbers = range(self.global_rank, settings.num_teachers, world_size)
        indices = partition(self.plan.dataset_size, settings.num_teachers, settings.public_seed)[list(numbers)]
        dataset, collate = trainer_checks.dataset_of(self.trainer), trainer_checks.collate_of(self.trainer)
        shards = read_shards(dataset, indices, num_classes=settings.num_classes, collate=collate)
        self._check_shapes(shards.features)
        self._teachers = Teachers(
            self._template[0],
            shards,
            numbers=numbers,
            lr=settings.teacher_lr,
            betas=settings.betas,
            chunk_size=settings.teacher_chunk_size,
            seed=settings.public_seed,
            device=self.device,
        )
        self._teach(settings.pretrain_steps, self._public(_PRETRAINING))

    def _check_shapes(self, features: Tensor) -> None:
        with torch.no_grad():
            made = self.generator(*self._draw(2, self._public(_PRETRAINING)))
        if made.shape[1:] != features.shape[2:]:
            raise ValueError(
                f"Expected the generator to make samples of the records' shape {tuple(features.shape[2:])}, got "
                f"{tuple(made.shape[1:])}. Change the generator's last layer."
            )
        if self.settings.top_k > made[0].numel():
            raise ValueError(
                f"Expected top_k <= {made[0].numel()}, the coordinates of one sample, got top_k={self.settings.top_k}. "
                "Lower it."
            )

    @override
    def on_train_end(self) -> None:
        """Free the teachers, and log the privacy summary in one line."""
        self.end_fit()
        rank_zero_info(statement.summary_line(self.plan, self.ledger, self.accountant))

    @override
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave training batches on their device, because only the shards are used."""
        if self.trainer.training:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)
