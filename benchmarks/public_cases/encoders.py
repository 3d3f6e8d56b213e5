"""Cases of encoders of text, series, events and tables, of two towers, and of an ordinal loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.public_cases.layers import CLASSES, NUM, classify, floats, labels, train, words
from benchmarks.public_cases.registry import BATCH, Task, case, fit


class MeanOf(nn.Module):
    """Classes from the mean over the positions of an encoder's output."""

    def __init__(self, body: nn.Module, dim: int = 16) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(dim, CLASSES)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x).mean(1))


def next_word(net: Any, batch: Any) -> Any:
    """Return the cross-entropy of each next token."""
    return nn.functional.cross_entropy(net(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


@case("xlstm")
def xlstm(arguments: dict[str, Any]) -> None:
    """xLSTM: one block with a matrix memory, one with a scalar memory."""
    import xlstm as package

    matrix = package.mLSTMBlockConfig(mlstm=package.mLSTMLayerConfig(qkv_proj_blocksize=4, num_heads=2))
    scalar = package.sLSTMBlockConfig(
        slstm=package.sLSTMLayerConfig(backend="vanilla", num_heads=2, bias_init="powerlaw_blockdependent"),
        feedforward=package.FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
    )
    config = package.xLSTMBlockStackConfig(
        mlstm_block=matrix, slstm_block=scalar, context_length=8, num_blocks=2, embedding_dim=16, slstm_at=[1]
    )
    train(MeanOf(package.xLSTMBlockStack(config)), classify, arguments, floats(8, 16), labels())


@case("mega-pytorch")
def mega(arguments: dict[str, Any]) -> None:
    """Mega: gated attention after an exponential moving average by Fourier transforms."""
    from mega_pytorch import Mega

    net = Mega(num_tokens=32, dim=16, depth=2, ema_heads=4, attn_dim_qk=8, attn_dim_value=16)
    train(net, next_word, arguments, words())


@case("block-recurrent-transformer-pytorch")
def block_recurrent(arguments: dict[str, Any]) -> None:
    """Transformer with states that are carried from block to block of a sequence."""
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    net = BlockRecurrentTransformer(
        num_tokens=32, dim=16, depth=2, dim_head=8, heads=2, max_seq_len=8, block_width=4, num_state_vectors=4,
        recurrent_layers=(2,),
    )  # fmt: skip
    train(net, lambda net, batch: net(batch[0], return_loss=True)[0], arguments, words(9))


@case("nystrom-attention", refused="exchanged for another record")
def nystrom(arguments: dict[str, Any]) -> None:
    """Nystrom attention, whose pseudo-inverse begins at the largest sum of rows in the batch."""
    from nystrom_attention import Nystromformer

    body = Nystromformer(dim=16, dim_head=8, heads=2, depth=1, num_landmarks=4, pinv_iterations=3)
    train(MeanOf(body), classify, arguments, floats(8, 16), labels())


@case("open_clip_torch", refused="two axes change|to be its gradient when run alone")
def open_clip(arguments: dict[str, Any]) -> None:
    """CLIP: two towers, whose negatives are other records."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP

    picture = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8}
    net = CLIP(8, picture, {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1})
    criterion = ClipLoss()
    train(net, lambda net, batch: criterion(*net(batch[1], batch[0])), arguments, words(), floats(3, 8, 8))


@case("coral-pytorch", per_sample_loss=True)
def corn(arguments: dict[str, Any]) -> None:
    """Ordinal classes by conditional probabilities, with a denominator of its own per class."""
    from coral_pytorch.losses import corn_loss

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES - 1))
    train(net, lambda net, batch: corn_loss(net(batch[0]), batch[1], CLASSES), arguments, floats(4), labels())


@case("pytorch-frame")
def frame_transformer(arguments: dict[str, Any]) -> None:
    """FTTransformer on frames of numbers and categories, which its own loader makes."""
    import pandas
    import torch_frame
    from torch_frame.data import DataLoader as FrameLoader
    from torch_frame.data import Dataset as Frames
    from torch_frame.nn.models import FTTransformer

    numbers, kinds = floats(2).numpy(), (torch.arange(NUM) % 4).numpy()
    table = pandas.DataFrame({"a": numbers[:, 0], "b": numbers[:, 1], "kind": kinds, "y": labels().numpy()})
    types = {"a": torch_frame.numerical, "b": torch_frame.numerical, "kind": torch_frame.categorical}
    data = Frames(table, types | {"y": torch_frame.categorical}, target_col="y")
    data.materialize()
    net = FTTransformer(
        channels=8, out_channels=CLASSES, num_layers=1, col_stats=data.col_stats,
        col_names_dict=data.tensor_frame.col_names_dict,
    )  # fmt: skip
    task = Task(net, lambda net, batch: nn.functional.cross_entropy(net(batch), batch.y))
    fit(task, FrameLoader(data.tensor_frame, batch_size=BATCH, shuffle=True), arguments)


@case("pytorch-lifestream")
def events(arguments: dict[str, Any]) -> None:
    """Recurrent encoder of bank transactions, as many per customer as there are."""
    from ptls.data_load.utils import collate_feature_dict
    from ptls.nn import RnnSeqEncoder, TrxEncoder

    class Customers(Dataset[Any]):
        def __len__(self) -> int:
            return NUM

        def __getitem__(self, index: int) -> Any:
            size, chance = 4 + index % 4, torch.Generator().manual_seed(index)
            kinds, amounts = torch.randint(1, 16, (size,), generator=chance), torch.randn(size, generator=chance)
            return {"kind": kinds, "amount": amounts, "event_time": torch.arange(size)}, index % CLASSES

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            encoder = TrxEncoder(
                embeddings={"kind": {"in": 16, "out": 4}}, numeric_values={"amount": "identity"}, use_batch_norm=False
            )
            self.body, self.head = RnnSeqEncoder(trx_encoder=encoder, hidden_size=8, type="gru"), nn.Linear(8, CLASSES)

        def forward(self, padded: Any) -> Any:
            return self.head(self.body(padded))

    def collate(records: list[Any]) -> Any:
        return collate_feature_dict([events for events, _ in records]), torch.tensor([label for _, label in records])

    fit(Task(Net(), classify), DataLoader(Customers(), batch_size=BATCH, collate_fn=collate), arguments)


@case("transformers")
def vilt(arguments: dict[str, Any]) -> None:
    """ViLT: words and patches, whose positions are stretched to the size of each picture."""
    from transformers import ViltConfig, ViltModel

    config = ViltConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4, max_position_embeddings=8, type_vocab_size=2,
    )  # fmt: skip

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = ViltModel(config), nn.Linear(16, CLASSES)

        def forward(self, ids: Any, pictures: Any) -> Any:
            return self.head(self.body(input_ids=ids, pixel_values=pictures).pooler_output)

    def loss(net: Any, batch: Any) -> Any:
        return nn.functional.cross_entropy(net(batch[0], batch[1]), batch[2])

    train(Net(), loss, arguments, words(), floats(3, 8, 8), labels())
