"""Cases of cells and tables."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.public_cases.registry import BATCH, EPOCHS, case, fit, without_checkpoint_flag


@case("scvi-tools")
def scvi(arguments: dict[str, Any]) -> None:
    """SCVI with layer norm."""
    import anndata
    import scvi as package

    rng = np.random.default_rng(0)
    data = anndata.AnnData(rng.poisson(2.0, (128, 20)).astype(np.float32))
    package.model.SCVI.setup_anndata(data)
    model = package.model.SCVI(data, n_hidden=16, n_latent=4, use_batch_norm="none", use_layer_norm="both")
    model.train(max_epochs=EPOCHS, batch_size=BATCH, train_size=1.0, **arguments)


@case("chemprop", per_sample_loss=True)
def chemprop(arguments: dict[str, Any]) -> None:
    """Message passing over molecules, without batch norm: its loss is a mean over all known targets of the batch."""
    from chemprop import data, models
    from chemprop import nn as layers

    smiles = ["CCO", "c1ccccc1", "CC(=O)O", "CCN", "C1CCCCC1", "CCCC", "OCCO", "CC#N"] * 8
    points = [data.MoleculeDatapoint.from_smi(s, [float(len(s))]) for s in smiles]
    loader = data.build_dataloader(data.MoleculeDataset(points), batch_size=BATCH, num_workers=0)
    model = models.MPNN(
        layers.BondMessagePassing(d_h=16),
        layers.MeanAggregation(),
        layers.RegressionFFN(input_dim=16, hidden_dim=16),
        batch_norm=False,
    )
    fit(model, loader, arguments)


@case("chemprop", refused="made NaN")
def chemprop_shared(arguments: dict[str, Any]) -> None:
    """Message passing over molecules, under a mean over the targets that are known."""
    chemprop(arguments)


def tabular(name: str, arguments: dict[str, Any], **options: Any) -> None:
    """Train an estimator of deeptab."""
    import importlib

    import pandas as pd

    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(128, 4)), columns=list("abcd"))
    target = table.sum(axis=1).to_numpy()
    model = getattr(importlib.import_module("deeptab.models"), name)(**options)
    passed = without_checkpoint_flag(arguments)
    model.fit(table, target, max_epochs=EPOCHS, batch_size=BATCH, rebuild=True, **passed)


@case("deeptab")
def ft_transformer(arguments: dict[str, Any]) -> None:
    """FT-Transformer."""
    tabular("FTTransformerRegressor", arguments)


@case("deeptab")
def tabula_rnn(arguments: dict[str, Any]) -> None:
    """TabulaRNN."""
    tabular("TabulaRNNRegressor", arguments)


@case("deeptab")
def mlp_deeptab(arguments: dict[str, Any]) -> None:
    """MLP."""
    tabular("MLPRegressor", arguments)
