"""Cases of tables, recommendations, sequences and further layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.public_cases.layers import CLASSES, NUM, classify, floats, labels, train, words
from benchmarks.public_cases.registry import BATCH, Task, case, fit
from benchmarks.public_cases.science import mse
from benchmarks.public_cases.sequences import next_token


@case("pytorch-tabular")
def gandalf(arguments: dict[str, Any]) -> None:
    """GANDALF: gated units that choose features."""
    pytorch_tabular("GANDALFConfig", arguments, gflu_stages=2)


@case("pytorch-tabular")
def autoint(arguments: dict[str, Any]) -> None:
    """AutoInt: attention among features."""
    pytorch_tabular("AutoIntConfig", arguments, num_heads=2, attn_embed_dim=4, num_attn_blocks=1)


@case("pytorch-tabular", fix=True)
def gate(arguments: dict[str, Any]) -> None:
    """Gated ensemble of soft trees, whose batch norm is exchanged."""
    pytorch_tabular("GatedAdditiveTreeEnsembleConfig", arguments, num_trees=2, tree_depth=2, gflu_stages=1)


@case("pytorch-tabular", fix=True)
def mixture_density(arguments: dict[str, Any]) -> None:
    """Mixture of densities above a perceptron, whose batch norm is exchanged."""
    from pytorch_tabular.models.common.heads import MixtureDensityHeadConfig

    head = MixtureDensityHeadConfig(num_gaussian=2).__dict__
    pytorch_tabular(
        "MDNConfig", arguments, head_config=head, backbone_config_class="CategoryEmbeddingModelConfig",
        backbone_config_params={"task": "backbone", "layers": "16-8"},
    )  # fmt: skip


def pytorch_tabular(config: str, arguments: dict[str, Any], **options: Any) -> None:
    """Train a LightningModule of pytorch-tabular on its own datamodule."""
    import numpy as np
    import pandas as pd
    from pytorch_tabular import TabularModel, models
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig

    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(128, 4)), columns=list("abcd"))
    table["kind"] = rng.integers(3, size=128).astype(str)
    table["y"] = table[list("abcd")].sum(axis=1)
    options.setdefault("batch_norm_continuous_input", config.startswith("Gated"))
    model = TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=list("abcd"), categorical_cols=["kind"]),
        model_config=getattr(models, config)(task="regression", **options),
        optimizer_config=OptimizerConfig(), trainer_config=TrainerConfig(batch_size=BATCH),
    )  # fmt: skip
    data = model.prepare_dataloader(train=table, validation=table[:32], seed=0)
    fit(model.prepare_model(data), data.train_dataloader(), arguments, "pytorch_lightning")


@case("rtdl-revisiting-models")
def rtdl(arguments: dict[str, Any]) -> None:
    """FT-Transformer with tokens of features."""
    from rtdl_revisiting_models import FTTransformer

    net = FTTransformer(
        n_cont_features=4, cat_cardinalities=[], d_out=CLASSES, n_blocks=1, d_block=16, attention_n_heads=2,
        attention_dropout=0.1, ffn_d_hidden=None, ffn_d_hidden_multiplier=2.0, ffn_dropout=0.1, residual_dropout=0.0,
    )  # fmt: skip
    train(
        net,
        lambda net, batch: nn.functional.cross_entropy(net(batch[0], None), batch[1]),
        arguments,
        floats(4),
        labels(),
    )


@case("tab-transformer-pytorch")
def tab_transformer(arguments: dict[str, Any]) -> None:
    """FT-Transformer with hyper-connections of residual streams."""
    from tab_transformer_pytorch import FTTransformer

    net = FTTransformer(categories=(3, 4), num_continuous=4, dim=8, depth=1, heads=2, dim_head=4, dim_out=CLASSES)

    def loss(net: Any, batch: Any) -> Any:
        return nn.functional.cross_entropy(net(batch[0], batch[1]), batch[2])

    train(net, loss, arguments, words(2, 3), floats(4), labels())


@case("deepctr-torch")
def deepfm(arguments: dict[str, Any]) -> None:
    """DeepFM: factorization machine and perceptron over embeddings, with its penalty."""
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import DeepFM

    columns = [*(SparseFeat(name, 8, 4) for name in "ab"), DenseFeat("c", 1)]
    net = DeepFM(columns, columns, dnn_hidden_units=(8,), l2_reg_embedding=1e-3)

    def loss(net: Any, batch: Any) -> Any:
        predicted = net(torch.cat([batch[0].float(), batch[1]], 1))[:, 0]
        return nn.functional.binary_cross_entropy(predicted, batch[2]) + net.get_regularization_loss().sum()

    train(net, loss, arguments, words(2, 8), floats(1), labels().clamp(max=1).float())


@case("torch-rechub", fix=True)
def dcn(arguments: dict[str, Any]) -> None:
    """Deep and cross network with experts of low rank, whose batch norms are exchanged."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.ranking import DCNv2

    net = DCNv2(
        [SparseFeature("user", 8, 4), SparseFeature("item", 8, 4), DenseFeature("price")], n_cross_layers=2,
        low_rank=4, num_experts=2, mlp_params={"dims": [8], "dropout": 0.1},
    )  # fmt: skip

    class Clicks(Dataset[Any]):
        def __init__(self) -> None:
            self.pairs, self.price = words(2, 8), floats(1)[:, 0]

        def __len__(self) -> int:
            return NUM

        def __getitem__(self, index: int) -> Any:
            user, item = self.pairs[index]
            return {"user": user, "item": item, "price": self.price[index]}, float(index % 2)

    def loss(net: Any, batch: Any) -> Any:
        return nn.functional.binary_cross_entropy(net(batch[0]), batch[1].float())

    fit(Task(net, loss), DataLoader(Clicks(), batch_size=BATCH), arguments)


@case("pytorch-lattice")
def lattice(arguments: dict[str, Any]) -> None:
    """Interpolation in a learned grid of three features."""
    from pytorch_lattice.layers import Lattice

    train(Lattice([3, 3, 2]), mse, arguments, torch.rand(NUM, 3), floats(1))


@case("linformer")
def linformer(arguments: dict[str, Any]) -> None:
    """Language model whose keys and values are projected along the sequence."""
    from linformer import LinformerLM

    train(LinformerLM(num_tokens=32, dim=16, seq_len=8, depth=1, heads=2, k=4), next_token, arguments, words())


@case("reformer-pytorch")
def reformer(arguments: dict[str, Any]) -> None:
    """Reversible layers whose attention is chosen by random hashes."""
    from reformer_pytorch import ReformerLM

    net = ReformerLM(num_tokens=32, dim=16, depth=2, max_seq_len=16, heads=2, bucket_size=4, n_hashes=2, causal=True)
    train(net, next_token, arguments, words(16))


@case("linear-attention-transformer")
def linear_attention(arguments: dict[str, Any]) -> None:
    """Language model with causal attention of linear cost."""
    from linear_attention_transformer import LinearAttentionTransformerLM

    net = LinearAttentionTransformerLM(num_tokens=32, dim=16, heads=2, depth=1, max_seq_len=16, causal=True)
    train(net, next_token, arguments, words(16))


@case("g-mlp-pytorch")
def gmlp(arguments: dict[str, Any]) -> None:
    """Gated perceptrons along the sequence, with layers that drop out."""
    from g_mlp_pytorch import gMLP

    train(gMLP(num_tokens=32, dim=16, depth=2, seq_len=8, prob_survival=0.9), next_token, arguments, words())


@case("sru")
def sru(arguments: dict[str, Any]) -> None:
    """Simple recurrent units in both directions."""
    from sru import SRU

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = SRU(4, 8, num_layers=2, bidirectional=True), nn.Linear(16, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.body(x.transpose(0, 1))[0].mean(0))

    train(Net(), classify, arguments, floats(5, 4), labels())


@case("titans-pytorch")
def titans(arguments: dict[str, Any]) -> None:
    """Memory whose weights learn by gradients within the forward of each sequence."""
    from titans_pytorch import NeuralMemory

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory, self.head = NeuralMemory(dim=8, chunk_size=4), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.memory(x)[0].mean(1))

    train(Net(), classify, arguments, floats(8, 8), labels())


@case("iTransformer")
def itransformer(arguments: dict[str, Any]) -> None:
    """Attention among the series of a record."""
    from iTransformer import iTransformer

    net = iTransformer(
        num_variates=3, lookback_len=8, dim=16, depth=1, heads=2, dim_head=8, pred_length=4, flash_attn=False
    )
    train(
        net,
        lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[1]),
        arguments,
        floats(8, 3),
        floats(4, 3),
    )


@case("mixture-of-experts")
def experts(arguments: dict[str, Any]) -> None:
    """Experts of limited capacity, with a loss that balances them within each record."""
    from mixture_of_experts import MoE

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = MoE(dim=8, num_experts=4, hidden_dim=8), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            hidden, self.balance = self.body(x)
            return self.head(hidden.mean(1))

    train(Net(), lambda net, batch: classify(net, batch) + net.balance, arguments, floats(4, 8), labels())


@case("kan-gpt")
def kan_layers(arguments: dict[str, Any]) -> None:
    """Kolmogorov-Arnold layers of the package, with splines on a grid."""
    from kan_gpt.kan.KAN import KAN

    train(KAN(width=[4, 5, CLASSES]), classify, arguments, floats(4), labels())


@case("torch-uncertainty")
def packed(arguments: dict[str, Any]) -> None:
    """Ensemble of packed layers, as grouped convolutions."""
    from torch_uncertainty.layers import PackedLinear

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = PackedLinear(4, 8, alpha=2, num_estimators=2, first=True)
            self.head = PackedLinear(8, CLASSES, alpha=2, num_estimators=2, last=True)

        def forward(self, x: Any) -> Any:
            hidden = self.head(self.first(x).relu())
            return hidden.unflatten(0, (2, len(x))).mean(0)

    train(Net(), classify, arguments, floats(4), labels())


@case("kornia", fix=True)
def tiny_vit(arguments: dict[str, Any]) -> None:
    """Vision transformer in windows after convolutions, whose batch norms are exchanged."""
    from kornia.models.tiny_vit import TinyViT

    net = TinyViT(
        img_size=32, num_classes=CLASSES, embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
        window_sizes=(4, 4, 2, 1),
    )  # fmt: skip
    train(net, classify, arguments, floats(3, 32, 32), labels())
