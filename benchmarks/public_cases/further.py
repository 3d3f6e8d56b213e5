"""Cases of further kinds of models: perceivers, slots, graphs of atoms, ensembles, survival, flows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.public_cases.layers import CLASSES, NUM, classify, floats, labels, train, words
from benchmarks.public_cases.registry import case


@case("perceiver-pytorch")
def perceiver(arguments: dict[str, Any]) -> None:
    """Perceiver: learned latents that look at the pixels of a picture."""
    from perceiver_pytorch import Perceiver

    net = Perceiver(
        num_freq_bands=2, depth=2, max_freq=4.0, input_channels=3, num_latents=4, latent_dim=8, latent_heads=2,
        cross_dim_head=4, latent_dim_head=4, num_classes=CLASSES, weight_tie_layers=True,
    )  # fmt: skip
    train(net, classify, arguments, floats(6, 6, 3), labels())


@case("egnn-pytorch")
def egnn(arguments: dict[str, Any]) -> None:
    """Graph network that is equivariant under rotations, on the positions of atoms."""
    from egnn_pytorch import EGNN_Network

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = EGNN_Network(num_tokens=8, dim=8, depth=2, num_nearest_neighbors=3), nn.Linear(8, 1)

        def forward(self, kinds: Any, places: Any) -> Any:
            return self.head(self.body(kinds, places)[0].mean(1)).squeeze(1)

    def loss(net: Any, batch: Any) -> Any:
        return nn.functional.mse_loss(net(batch[0], batch[1]), batch[2])

    train(Net(), loss, arguments, words(6, 8), floats(6, 3), torch.randn(NUM))


@case("slot-attention")
def slots(arguments: dict[str, Any]) -> None:
    """Slot attention: slots drawn from a learned distribution compete for inputs, by a cell in three turns."""
    from slot_attention import SlotAttention

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slots, self.head = SlotAttention(num_slots=3, dim=8, iters=3, hidden_dim=8), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.slots(x)).amax(1)

    train(Net(), classify, arguments, floats(5, 8), labels())


@case("tabm")
def tabm(arguments: dict[str, Any]) -> None:
    """TabM: an ensemble of perceptrons for tables that share their weights but for scales."""
    from tabm import TabM

    net = TabM.make(n_num_features=4, cat_cardinalities=[], d_out=CLASSES, n_blocks=2, d_block=16, k=4)

    def loss(net: Any, batch: Any) -> Any:
        scores = net(batch[0])
        return nn.functional.cross_entropy(scores.flatten(0, 1), batch[1].repeat_interleave(scores.shape[1]))

    train(net, loss, arguments, floats(4), labels())


@case("minGRU-pytorch")
def min_gru(arguments: dict[str, Any]) -> None:
    """Recurrent layer without hidden states in its gates, computed by a parallel scan of logarithms."""
    from minGRU_pytorch import minGRU

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = minGRU(dim=8, expansion_factor=1.5), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.body(x)[:, -1])

    train(Net(), classify, arguments, floats(6, 8), labels())


@case("torchsurv", refused="to be its gradient when run alone")
def cox(arguments: dict[str, Any]) -> None:
    """Survival under Cox's partial likelihood, which compares each record with all that are at risk."""
    from torchsurv.loss.cox import neg_partial_log_likelihood

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    times, events = torch.rand(NUM) + 0.1, torch.arange(NUM) % 3 > 0

    def loss(net: Any, batch: Any) -> Any:
        return neg_partial_log_likelihood(net(batch[0]), batch[1], batch[2])

    train(net, loss, arguments, floats(4), events, times)


@case("FrEIA")
def freia(arguments: dict[str, Any]) -> None:
    """Invertible network of coupling blocks."""
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    def inner(num_in: int, num_out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(num_in, 8), nn.ReLU(), nn.Linear(8, num_out))

    net = SequenceINN(4)
    for _ in range(2):
        net.append(AllInOneBlock, subnet_constructor=inner, permute_soft=True)

    def loss(net: Any, batch: Any) -> Any:
        found, log_volume = net(batch[0])
        return (0.5 * found.square().sum(1) - log_volume).mean()

    train(net, loss, arguments, floats(4))


@case("torchcde")
def controlled_ode(arguments: dict[str, Any]) -> None:
    """Neural controlled differential equation along splines through the observations."""
    import torchcde

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6 * 3)

        def forward(self, t: Any, z: Any) -> Any:
            return self.layer(z).tanh().view(len(z), 6, 3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.begin, self.field, self.head = nn.Linear(3, 6), Field(), nn.Linear(6, CLASSES)

        def forward(self, observed: Any) -> Any:
            path = torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(observed))
            begin = self.begin(path.evaluate(path.interval[0]))
            steps = {"step_size": 1.0}
            found = torchcde.cdeint(path, self.field, begin, path.interval, adjoint=False, method="rk4", options=steps)
            return self.head(found[:, -1])

    train(Net(), classify, arguments, floats(6, 3), labels())
