"""Cases of packages of layers for sequences: attention, recurrent cells, scans and convolutions over time."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.public_cases.layers import CLASSES, classify, floats, labels, train, words
from benchmarks.public_cases.registry import case


def next_token(net: Any, batch: Any) -> Any:
    """Return the cross-entropy of the next token."""
    return nn.functional.cross_entropy(net(batch[0])[:, :-1].mT, batch[0][:, 1:])


@case("x-transformers")
def x_decoder(arguments: dict[str, Any]) -> None:
    """Decoder with rotary positions, SwiGLU and RMS norm."""
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=2, heads=2, rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True)
    train(TransformerWrapper(num_tokens=32, max_seq_len=8, attn_layers=layers), next_token, arguments, words())


@case("x-transformers")
def x_encoder(arguments: dict[str, Any]) -> None:
    """Vision transformer over an encoder."""
    from x_transformers import Encoder, ViTransformerWrapper

    net = ViTransformerWrapper(
        image_size=16, patch_size=8, num_classes=CLASSES, attn_layers=Encoder(dim=16, depth=2, heads=2)
    )
    train(net, classify, arguments, floats(3, 16, 16), labels())


@case("entmax")
def entmax_attention(arguments: dict[str, Any]) -> None:
    """Attention and loss by entmax."""
    from entmax import entmax15, entmax15_loss

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.query, self.head = nn.Embedding(32, 8), nn.Linear(8, 1), nn.Linear(8, CLASSES)

        def forward(self, ids: Any) -> Any:
            hidden = self.embed(ids)
            return self.head((entmax15(self.query(hidden).squeeze(-1), dim=1).unsqueeze(-1) * hidden).sum(1))

    train(Net(), lambda net, batch: entmax15_loss(net(batch[0]), batch[1]).mean(), arguments, words(), labels())


@case("pytorch-crf")
def crf(arguments: dict[str, Any]) -> None:
    """Conditional random field over an embedding."""
    from torchcrf import CRF

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.crf = nn.Embedding(32, 8), nn.Linear(8, 4), CRF(4, batch_first=True)

        def forward(self, ids: Any, tags: Any) -> Any:
            return -self.crf(self.head(self.embed(ids)), tags, reduction="mean")

    train(Net(), lambda net, batch: net(*batch), arguments, words(), words() % 4)


@case("rotary-embedding-torch")
def rotary(arguments: dict[str, Any]) -> None:
    """Attention with rotary positions."""
    from rotary_embedding_torch import RotaryEmbedding

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotary, self.qkv, self.head = RotaryEmbedding(dim=4), nn.Linear(6, 24), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            q, k = self.rotary.rotate_queries_or_keys(q), self.rotary.rotate_queries_or_keys(k)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))

    train(Net(), classify, arguments, floats(5, 6), labels())


@case("ncps")
def closed_form(arguments: dict[str, Any]) -> None:
    """Closed-form continuous-time network."""
    from ncps.torch import CfC

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = CfC(3, 8, proj_size=CLASSES)

        def forward(self, x: Any) -> Any:
            return self.cells(x)[0][:, -1]

    train(Net(), classify, arguments, floats(6, 3), labels())


@case("ncps")
def liquid(arguments: dict[str, Any]) -> None:
    """Liquid time-constant network under a wiring."""
    from ncps.torch import LTC
    from ncps.wirings import AutoNCP

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = LTC(3, AutoNCP(12, CLASSES))

        def forward(self, x: Any) -> Any:
            return self.cells(x)[0][:, -1]

    train(Net(), classify, arguments, floats(4, 3), labels())


@case("pytorch-tcn")
def temporal_convolutions(arguments: dict[str, Any]) -> None:
    """Temporal convolutions with weight norm and skip connections."""
    from pytorch_tcn import TCN

    net = TCN(3, [8, 8], use_skip_connections=True, output_projection=CLASSES)
    train(
        net, lambda net, batch: nn.functional.cross_entropy(net(batch[0])[..., -1], batch[1]), arguments,
        floats(3, 12), labels(),
    )  # fmt: skip


@case("mambapy")
def mamba_py(arguments: dict[str, Any]) -> None:
    """Mamba with a parallel scan as a function of autograd."""
    from mambapy.mamba import Mamba, MambaConfig

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Mamba(MambaConfig(d_model=8, n_layers=2)), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.body(x).mean(1))

    train(Net(), classify, arguments, floats(8, 8), labels())


@case("local-attention")
def local_attention(arguments: dict[str, Any]) -> None:
    """Language model with local attention."""
    from local_attention import LocalTransformer

    net = LocalTransformer(
        num_tokens=32, dim=16, depth=2, max_seq_len=8, causal=True, local_attn_window_size=4, heads=2, dim_head=8
    )
    train(net, next_token, arguments, words())


@case("conformer", refused="BatchNorm")
def conformer(arguments: dict[str, Any]) -> None:
    """Conformer block with batch norm."""
    from conformer import ConformerBlock

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = ConformerBlock(dim=16, dim_head=8, heads=2), nn.Linear(16, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.block(x).mean(1))

    train(Net(), classify, arguments, floats(8, 16), labels())


@case("conformer", fix=True)
def conformer_fixed(arguments: dict[str, Any]) -> None:
    """Conformer block whose batch norm is exchanged."""
    conformer(arguments)
