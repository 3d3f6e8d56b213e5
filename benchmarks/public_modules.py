"""Public packages trained with and without privacy, unchanged: result, method, ratio of step times, message.

    python -m benchmarks.public_modules nbeats tft    # in an environment that holds the package of these cases
    python -m benchmarks.public_modules --table       # writes public_modules.md from all results so far

Each case is toy-sized and trains as its package's own documentation does. The package is a guest: nothing of it is
changed. The ratio of step times is measured on whatever else the machine does: a hint, not a figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

RESULTS = Path(__file__).with_name("public_modules.json")
TABLE = Path(__file__).with_name("public_modules.md")
EPOCHS, BATCH = 3, 16
WAYS = {"PerSampleEngine": "rules", "SingleSampleEngine": "one at a time"}

CASES: dict[str, tuple[str, Callable[[dict[str, Any]], Any], dict[str, Any]]] = {}


def case(package: str, **options: Any) -> Callable[[Any], Any]:
    """Register a case: a function that trains with the given arguments of a Trainer; ``options`` are the strategy's."""

    def enter(train: Callable[[dict[str, Any]], Any]) -> Any:
        CASES[train.__name__] = package, train, options
        return train

    return enter


def fit(module: Any, data: Any, arguments: dict[str, Any], package: str = "lightning.pytorch") -> Any:
    """Train a module with a Trainer of one of the two packages of Lightning."""
    import importlib

    trainer = importlib.import_module(package).Trainer(max_epochs=EPOCHS, **arguments)
    trainer.fit(module, data)
    if arguments["strategy"] != "auto":  # save and resume
        path = Path(arguments["default_root_dir"]) / "resume.ckpt"
        trainer.save_checkpoint(path)
        trainer.fit_loop.max_epochs += 1
        steps = trainer.strategy.ledger.num_steps
        trainer.fit(module, data, ckpt_path=path, weights_only=False)
        assert trainer.strategy.ledger.num_steps > steps
    return trainer


def without_checkpoint_flag(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for packages that bring a checkpoint callback of their own."""
    return {name: value for name, value in arguments.items() if name != "enable_checkpointing"}


class Task:
    """A LightningModule around a model whose output has a loss, or around a loss of output and batch."""

    def __new__(cls, model: nn.Module, loss: Callable[[nn.Module, Any], Any]) -> Any:
        """Return the module."""
        import lightning as L

        class Module(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return loss(self.model, batch)

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.parameters(), lr=1e-3)

        return Module()


# ---------------------------------------------------------------- forecasting


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


@case("pytorch-forecasting")
def nbeats(arguments: dict[str, Any]) -> None:
    """N-BEATS."""
    forecasting("NBeats", arguments, known=False, widths=[16, 32], backcast_loss_ratio=0.1)


@case("pytorch-forecasting")
def nhits(arguments: dict[str, Any]) -> None:
    """N-HiTS."""
    forecasting("NHiTS", arguments, known=False, hidden_size=16)


@case("pytorch-forecasting")
def tft(arguments: dict[str, Any]) -> None:
    """Temporal fusion transformer."""
    forecasting("TemporalFusionTransformer", arguments, hidden_size=8, attention_head_size=2, hidden_continuous_size=4)


@case("pytorch-forecasting")
def deepar_pf(arguments: dict[str, Any]) -> None:
    """DeepAR."""
    forecasting("DeepAR", arguments, hidden_size=8, rnn_layers=2)


@case("pytorch-forecasting")
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
    """PatchTST."""
    gluonts("PatchTSTEstimator", arguments, patch_len=4, d_model=8, nhead=2, dim_feedforward=16)


@case("gluonts", **STREAM)
def deepar_gluonts(arguments: dict[str, Any]) -> None:
    """DeepAR."""
    gluonts("DeepAREstimator", arguments, hidden_size=8)


@case("neuralforecast")
def nhits_neural(arguments: dict[str, Any]) -> None:
    """NHITS; Trainer and module are of pytorch_lightning."""
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    table = series().rename(columns={"series": "unique_id", "time": "ds", "value": "y"})
    options = without_checkpoint_flag(arguments)
    model = NHITS(h=4, input_size=12, max_steps=20, batch_size=3, mlp_units=3 * [[16, 16]], **options)
    NeuralForecast(models=[model], freq=1).fit(table)


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


# ---------------------------------------------------------------- cells, molecules, tables, graphs


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


@case("chemprop")
def chemprop(arguments: dict[str, Any]) -> None:
    """Message passing over molecules, without batch norm."""
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


def graphs() -> list[Any]:
    """Return random graphs of different size."""
    from torch_geometric.data import Data

    torch.manual_seed(0)
    made = []
    for number in range(64):
        size = 3 + number % 5
        edges = torch.randint(size, (2, 3 * size))
        made.append(Data(x=torch.randn(size, 6), edge_index=edges, y=torch.tensor([number % 3])))
    return made


@case("torch_geometric")
def gcn(arguments: dict[str, Any]) -> None:
    """Two graph convolutions and a mean over the nodes of each graph."""
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import GCNConv, global_mean_pool

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = GCNConv(6, 8), GCNConv(8, 8), nn.Linear(8, 3)

        def forward(self, batch: Any) -> Any:
            hidden = self.first(batch.x, batch.edge_index).relu()
            return self.head(global_mean_pool(self.second(hidden, batch.edge_index), batch.batch))

    task = Task(Net(), lambda net, batch: nn.functional.cross_entropy(net(batch), batch.y))
    fit(task, GraphLoader(graphs(), batch_size=BATCH, shuffle=True), arguments)


# ---------------------------------------------------------------- images


def images(size: int = 16, channels: int = 3, num: int = 64) -> DataLoader[Any]:
    """Return random pictures with labels."""
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(num, channels, size, size), torch.arange(num) % 3), batch_size=BATCH)


@case("diffusers")
def unet2d(arguments: dict[str, Any]) -> None:
    """UNet2D under a denoising loss."""
    from diffusers import DDPMScheduler, UNet2DModel

    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=50)

    def loss(net: Any, batch: Any) -> Any:
        noise = torch.randn_like(batch[0])
        times = torch.randint(0, 50, (len(noise),), device=noise.device)
        return nn.functional.mse_loss(net(scheduler.add_noise(batch[0], noise, times), times).sample, noise)

    fit(Task(model, loss), images(), arguments)


def classify(net: Any, batch: Any) -> Any:
    """Return the cross-entropy of a picture classifier."""
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


@case("timm", fix=True)
def efficientnet(arguments: dict[str, Any]) -> None:
    """EfficientNet, whose batch norms are subclasses with an activation; ``fix=True``."""
    import timm

    fit(Task(timm.create_model("test_efficientnet", num_classes=3), classify), images(32), arguments)


@case("timm")
def vit(arguments: dict[str, Any]) -> None:
    """Vision transformer."""
    import timm

    fit(Task(timm.create_model("test_vit", num_classes=3, img_size=32), classify), images(32), arguments)


@case("segmentation-models-pytorch", fix=True)
def unet(arguments: dict[str, Any]) -> None:
    """U-Net on a ResNet; ``fix=True``."""
    import segmentation_models_pytorch as smp

    model = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=1)
    task = Task(model, lambda net, batch: net(batch[0]).square().mean())
    fit(task, images(32), arguments)


# ---------------------------------------------------------------- language and speech


class Tokens(Dataset[Any]):
    """Toy sentences of equal length, or padded ones with labels of -100."""

    def __init__(self, *, padded: bool = False, labels: str = "tokens") -> None:
        torch.manual_seed(0)
        self.ids, self.padded, self.kind = torch.randint(3, 30, (64, 8)), padded, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, length = self.ids[index].clone(), 4 + index % 5 if self.padded else 8
        ids[length:] = 0
        mask = (torch.arange(8) < length).long()
        labels = ids.masked_fill(mask == 0, -100) if self.kind == "tokens" else (ids % 3).masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def language(model: Any, arguments: dict[str, Any], **options: Any) -> None:
    """Train a model of transformers by its own loss."""
    fit(Task(model, lambda net, batch: net(**batch).loss), DataLoader(Tokens(**options), batch_size=BATCH), arguments)


@case("transformers")
def t5(arguments: dict[str, Any]) -> None:
    """T5."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    language(T5ForConditionalGeneration(config), arguments)


@case("transformers")
def mamba(arguments: dict[str, Any]) -> None:
    """Mamba."""
    from transformers import MambaConfig, MambaForCausalLM

    language(MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)), arguments)


@case("transformers")
def wav2vec2(arguments: dict[str, Any]) -> None:
    """Wav2vec2, classifying sequences."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 3), num_feat_extract_layers=2, num_labels=3,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True, classifier_proj_size=8, apply_spec_augment=False,
    )  # fmt: skip
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 400), torch.arange(64) % 3), batch_size=BATCH)
    model = Wav2Vec2ForSequenceClassification(config)
    fit(Task(model, lambda net, batch: net(batch[0], labels=batch[1]).loss), data, arguments)


@case("transformers", per_sample_loss=True)
def bert_tokens(arguments: dict[str, Any]) -> None:
    """BERT, labelling tokens, padding at -100: its loss is a mean over all tokens of the batch."""
    from transformers import BertConfig, BertForTokenClassification

    language(BertForTokenClassification(BertConfig(**SMALL, num_labels=3)), arguments, padded=True, labels="classes")


@case("transformers", per_sample_loss=True)
def llama(arguments: dict[str, Any]) -> None:
    """Llama on padded sentences: its loss is a mean over all tokens of the batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    language(LlamaForCausalLM(LlamaConfig(**SMALL)), arguments, padded=True)


@case("transformers")
def llama_equal(arguments: dict[str, Any]) -> None:
    """Llama on sentences of equal length."""
    from transformers import LlamaConfig, LlamaForCausalLM

    language(LlamaForCausalLM(LlamaConfig(**SMALL)), arguments)


# ---------------------------------------------------------------- running and writing


def clock(package: str) -> tuple[Any, list[float], list[Any]]:
    """Return a callback of one of Lightning's packages that times batches and records the strategy's method."""
    import importlib

    times: list[float] = []
    ways: list[Any] = []

    class Clock(importlib.import_module(package).Callback):  # type: ignore[misc]
        def on_train_batch_start(self, *args: Any) -> None:
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            times.append(time.perf_counter() - self.began)
            fit_now = getattr(trainer.strategy, "_fit", None)
            if fit_now is not None:
                ways[:] = [type(fit_now.step.engine).__name__]

    return Clock(), times, ways


def run(name: str) -> dict[str, Any]:
    """Train a case with and without privacy; return the observations."""
    package, train, options = CASES[name]
    tree = "pytorch_lightning" if package in ("darts", "neuralforecast") else "lightning.pytorch"
    found: dict[str, Any] = {
        "case": name,
        "package": package,
        "what": (train.__doc__ or "").strip(),
        "options": options,
    }
    seconds: list[float] = []
    for private in (False, True):
        callback, times, ways = clock(tree)
        with tempfile.TemporaryDirectory() as folder:
            arguments = {
                "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
                "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
                "strategy": "auto", "callbacks": [callback],
            }  # fmt: skip
            try:
                if private:
                    from lightning_dp import DPStrategy, EpsilonMonitor

                    arguments["strategy"] = DPStrategy(noise_multiplier=1.0, **options)
                    arguments["callbacks"].append(EpsilonMonitor(every_n_steps=1))
                torch.manual_seed(0)
                train(arguments)
            except Exception as error:
                notes = " ".join(getattr(error, "__notes__", []))
                found["message"] = f"{type(error).__name__}: {error} {notes}"[:700]
                found["failed"] = "private" if private else "plain"
                found["trace"] = traceback.format_exc()[-2000:]
                return found
        seconds.append(statistics.median(times[3:]) if len(times) > 3 else float("nan"))
        found["way"] = ways[0] if ways else ""
        if private:
            found["steps"] = arguments["strategy"].ledger.num_steps
            found["ratio"] = round(seconds[1] / seconds[0], 1)
    return found


def write(found: dict[str, Any]) -> None:
    """Insert a result among the others."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[found["case"]] = found
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def table() -> str:
    """Return the results as a table."""
    results = json.loads(RESULTS.read_text())
    lines = [
        "# Public packages, unchanged",
        "",
        "Made by `python -m benchmarks.public_modules`. Ratios of step times come from a shared machine: hints, not "
        "figures.",
        "",
        "| package | model | trains | way | step to plain | message |",
        "|---|---|---|---|---|---|",
    ]
    for name in CASES:
        if name not in results:
            continue
        found = results[name]
        options = ", ".join(f"{key}={value}" for key, value in found["options"].items())
        failed = found.get("failed")
        trains = "yes" if failed is None else f"no ({failed})"
        message = found.get("message", "").replace("|", "/").replace("\n", " ")[:300]
        what = found["what"].rstrip(".") + (f" ({options})" if options else "")
        way = WAYS.get(found.get("way", ""), found.get("way", ""))
        row = (found["package"], what, trains, way, str(found.get("ratio", "")), message)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the named cases, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.cases:
        found = run(name)
        trace = found.pop("trace", "")
        print(json.dumps(found), trace, sep="\n", flush=True)
        write(found)
    if options.table:
        TABLE.write_text(table())


if __name__ == "__main__":
    main()
