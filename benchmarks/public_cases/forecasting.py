"""Cases of packages that forecast series."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.public_cases.registry import BATCH, EPOCHS, case, fit, without_checkpoint_flag


def series(num: int = 6, length: int = 40) -> Any:
    """Return a table of toy series: series, time, value."""
    import pandas as pd

    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "series": np.repeat([f"s{i}" for i in range(num)], length),
            "time": np.tile(np.arange(length), num),
            "value": np.concatenate(
                [np.sin(np.arange(length) / (2 + i)) + 0.1 * rng.normal(size=length) for i in range(num)]
            ),
        }
    )  # fmt: skip


def forecasting(name: str, arguments: dict[str, Any], *, decoder: int = 4, **options: Any) -> None:
    """Train a model of pytorch-forecasting."""
    import pytorch_forecasting as pf

    known = (
        {"static_categoricals": ["series"], "time_varying_known_reals": ["time"]} if options.pop("known", True) else {}
    )
    dataset = pf.TimeSeriesDataSet(
        series(), time_idx="time", target="value", group_ids=["series"], max_encoder_length=12, min_encoder_length=12,
        max_prediction_length=decoder, min_prediction_length=decoder, time_varying_unknown_reals=["value"], **known,
    )  # fmt: skip
    model = getattr(pf, name).from_dataset(dataset, learning_rate=1e-3, log_interval=-1, **options)
    fit(model, dataset.to_dataloader(train=True, batch_size=BATCH), arguments)


@case("pytorch-forecasting", per_sample_loss=True)
def nbeats(arguments: dict[str, Any]) -> None:
    """N-BEATS."""
    forecasting("NBeats", arguments, known=False, widths=[16, 32], backcast_loss_ratio=0.1)


@case("pytorch-forecasting", refused="a guard that skips")
def nbeats_guarded(arguments: dict[str, Any]) -> None:
    """N-BEATS under the package's loss, which is set to a constant where one sample is not finite."""
    nbeats(arguments)


@case("pytorch-forecasting", per_sample_loss=True)
def nhits(arguments: dict[str, Any]) -> None:
    """N-HiTS."""
    forecasting("NHiTS", arguments, known=False, hidden_size=16)


@case("pytorch-forecasting", per_sample_loss=True)
def tft(arguments: dict[str, Any]) -> None:
    """Temporal fusion transformer."""
    forecasting("TemporalFusionTransformer", arguments, hidden_size=8, attention_head_size=2, hidden_continuous_size=4)


@case("pytorch-forecasting", per_sample_loss=True)
def deepar_pf(arguments: dict[str, Any]) -> None:
    """DeepAR."""
    forecasting("DeepAR", arguments, hidden_size=8, rnn_layers=2)


@case("pytorch-forecasting", per_sample_loss=True)
def tide(arguments: dict[str, Any]) -> None:
    """TiDE."""
    from pytorch_forecasting import SMAPE

    forecasting("TiDEModel", arguments, hidden_size=16, loss=SMAPE())  # the default is one object of all models


def gluonts(name: str, arguments: dict[str, Any], **options: Any) -> None:
    """Train an estimator of gluonts; its own data loader is an iterable of batches."""
    import importlib

    from gluonts.dataset.pandas import PandasDataset

    table = series().astype({"value": np.float32})
    table.index = np.tile(np.datetime64("2020-01-01") + np.arange(40), 6)
    data = PandasDataset.from_long_dataframe(table, target="value", item_id="series", freq="D")
    kind = getattr(importlib.import_module("gluonts.torch"), name)
    if name != "DeepAREstimator":
        options["context_length"] = 12
    else:
        options["freq"] = "D"
    kind(
        prediction_length=4, batch_size=BATCH, num_batches_per_epoch=10,
        trainer_kwargs={"max_epochs": EPOCHS, **without_checkpoint_flag(arguments)}, **options,
    ).train(data)  # fmt: skip


STREAM = {"sampling": "shuffle", "neighboring_relation": "zero_out", "target_delta": 1e-3}


@case("gluonts", **STREAM)
def simple_feedforward(arguments: dict[str, Any]) -> None:
    """Feed-forward estimator."""
    gluonts("SimpleFeedForwardEstimator", arguments)


@case("gluonts", **STREAM)
def patchtst(arguments: dict[str, Any]) -> None:
    """PatchTST, each window scaled by its own deviation."""
    gluonts("PatchTSTEstimator", arguments, patch_len=4, d_model=8, nhead=2, dim_feedforward=16, scaling="std")


@case("gluonts", **STREAM)
def deepar_gluonts(arguments: dict[str, Any]) -> None:
    """DeepAR with a scale for series that were not observed."""
    gluonts("DeepAREstimator", arguments, hidden_size=8, default_scale=1.0)


@case("gluonts", refused="influence each other", **STREAM)
def deepar_coupled(arguments: dict[str, Any]) -> None:
    """DeepAR, which scales series that were not observed by the batch."""
    gluonts("DeepAREstimator", arguments, hidden_size=8)


def neural(name: str, arguments: dict[str, Any], **options: Any) -> None:
    """Train a model of neuralforecast; Trainer and module are of pytorch_lightning."""
    import neuralforecast.models
    from neuralforecast import NeuralForecast

    table = series().rename(columns={"series": "unique_id", "time": "ds", "value": "y"})
    kind, passed = getattr(neuralforecast.models, name), without_checkpoint_flag(arguments)
    model = kind(h=4, input_size=12, max_steps=2 * EPOCHS, batch_size=3, **options, **passed)
    NeuralForecast(models=[model], freq=1).fit(table)


@case("neuralforecast", per_sample_loss=True)
def nhits_neural(arguments: dict[str, Any]) -> None:
    """NHITS on windows drawn from all series of a batch."""
    neural("NHITS", arguments, mlp_units=3 * [[16, 16]])


@case("neuralforecast", per_sample_loss=True)
def dlinear_neural(arguments: dict[str, Any]) -> None:
    """DLinear on windows drawn from all series of a batch."""
    neural("DLinear", arguments, moving_avg_window=3)


@case("neuralforecast", per_sample_loss=True)
def gru_neural(arguments: dict[str, Any]) -> None:
    """GRU on all windows of each series."""
    options = {"encoder_hidden_size": 8, "encoder_n_layers": 1, "decoder_hidden_size": 8}
    neural("GRU", arguments, windows_batch_size=None, **options)


@case("neuralforecast", refused="a guard that skips")
def nhits_windows(arguments: dict[str, Any]) -> None:
    """NHITS on all windows of each series, under a loss that becomes 0 where one is not finite."""
    neural("NHITS", arguments, mlp_units=3 * [[16, 16]], windows_batch_size=None)


def darts(name: str, arguments: dict[str, Any], **options: Any) -> None:
    """Train a model of darts; Trainer and module are of pytorch_lightning."""
    import darts.models
    from darts import TimeSeries

    data = [TimeSeries.from_values(part["value"].to_numpy(np.float32)) for _, part in series().groupby("series")]
    model = getattr(darts.models, name)(
        input_chunk_length=12, output_chunk_length=4, n_epochs=EPOCHS, batch_size=BATCH, pl_trainer_kwargs=arguments,
        **options,
    )  # fmt: skip
    model.fit(data)


@case("darts")
def nbeats_darts(arguments: dict[str, Any]) -> None:
    """N-BEATS."""
    darts("NBEATSModel", arguments, num_blocks=1, num_layers=2, layer_widths=16)


@case("darts")
def tcn(arguments: dict[str, Any]) -> None:
    """Temporal convolutions."""
    darts("TCNModel", arguments, num_filters=4)


@case("darts")
def tft_darts(arguments: dict[str, Any]) -> None:
    """Temporal fusion transformer."""
    darts("TFTModel", arguments, hidden_size=8, num_attention_heads=2, add_relative_index=True)


@case("darts")
def block_rnn(arguments: dict[str, Any]) -> None:
    """LSTM."""
    darts("BlockRNNModel", arguments, model="LSTM", hidden_dim=8)


@case("darts")
def transformer_darts(arguments: dict[str, Any]) -> None:
    """Transformer."""
    darts("TransformerModel", arguments, d_model=8, nhead=2, dim_feedforward=16, num_decoder_layers=1)


@case("darts")
def tide_darts(arguments: dict[str, Any]) -> None:
    """TiDE with reversible instance norm."""
    darts("TiDEModel", arguments, hidden_size=16, decoder_output_dim=4, use_reversible_instance_norm=True)


@case("transformers")
def informer(arguments: dict[str, Any]) -> None:
    """Informer: each series' own queries that look at some keys most, with a likelihood of the forecast."""
    import torch
    from transformers import InformerConfig, InformerForPrediction

    from benchmarks.public_cases.layers import NUM, floats, train

    config = InformerConfig(
        prediction_length=4, context_length=12, lags_sequence=[1, 2, 3], num_time_features=1, d_model=8,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, sampling_factor=1,
    )  # fmt: skip

    def loss(net: Any, batch: Any) -> Any:
        names = ("past_values", "past_time_features", "future_values", "future_time_features")
        given = dict(zip(names, batch, strict=True))
        return net(**given, past_observed_mask=torch.ones_like(batch[0])).loss

    past, future = torch.randn(NUM, 15, 1), torch.randn(NUM, 4, 1)
    train(InformerForPrediction(config), loss, arguments, floats(15), past, torch.randn(NUM, 4), future)
