"""Cases of packages of layers, on toy records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.public_cases.registry import BATCH, Task, case, fit

NUM, CLASSES = 64, 3


def labels() -> torch.Tensor:
    """Return a class per record."""
    return torch.arange(NUM) % CLASSES


def train(net: nn.Module, loss: Callable[[Any, Any], Any], arguments: dict[str, Any], *columns: torch.Tensor) -> None:
    """Train a network on records of random numbers, by a loss of network and batch."""
    fit(Task(net, loss), DataLoader(TensorDataset(*columns), batch_size=BATCH), arguments)


def floats(*shape: int) -> torch.Tensor:
    """Return random numbers per record."""
    torch.manual_seed(1)
    return torch.randn(NUM, *shape)


def words(length: int = 8, vocabulary: int = 32) -> torch.Tensor:
    """Return random tokens per record."""
    torch.manual_seed(1)
    return torch.randint(1, vocabulary, (NUM, length))


def classify(net: Any, batch: Any) -> Any:
    """Return the cross-entropy of a classifier."""
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def likelihood(net: Any, batch: Any) -> Any:
    """Return the negative log-likelihood of a flow."""
    return -net.log_prob(batch[0]).mean()


@case("vector-quantize-pytorch")
def fsq(arguments: dict[str, Any]) -> None:
    """Autoencoder with finite scalar quantization."""
    from vector_quantize_pytorch import FSQ

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.quantize, self.decoder = nn.Linear(6, 3), FSQ([5, 5, 3]), nn.Linear(3, 6)

        def forward(self, x: Any) -> Any:
            return self.decoder(self.quantize(self.encoder(x))[0])

    train(Net(), lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[0]), arguments, floats(4, 6))


@case("vector-quantize-pytorch", refused="state|buffer|codebook|_codebook")
def vq(arguments: dict[str, Any]) -> None:
    """Autoencoder with vector quantization, whose codebook follows moving averages of the batch."""
    from vector_quantize_pytorch import VectorQuantize

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 6)
            self.quantize = VectorQuantize(dim=4, codebook_size=8)

        def forward(self, x: Any) -> Any:
            return self.decoder(self.quantize(self.encoder(x))[0])

    train(Net(), lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[0]), arguments, floats(4, 6))


def ode(arguments: dict[str, Any], method: str) -> None:
    """Train a classifier whose hidden layer is an ordinary differential equation."""
    from torchdiffeq import odeint

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), nn.Linear(4, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(odeint(lambda t, y: self.field(y), x, torch.linspace(0, 1, 5), method=method)[-1])

    train(Net(), classify, arguments, floats(4), labels())


@case("torchdiffeq")
def neural_ode(arguments: dict[str, Any]) -> None:
    """Neural ODE by the method of Runge and Kutta with fixed steps."""
    ode(arguments, "rk4")


@case("torchdiffeq", refused="Samples influence each other|samples influence each other")
def neural_ode_adaptive(arguments: dict[str, Any]) -> None:
    """Neural ODE by dopri5, whose steps follow an error norm over the batch."""
    ode(arguments, "dopri5")


@case("zuko")
def zuko_nsf(arguments: dict[str, Any]) -> None:
    """Neural spline flow, conditioned on a context."""
    import zuko

    flow = zuko.flows.NSF(3, 2, transforms=2, hidden_features=(16,))
    train(flow, lambda net, batch: -net(batch[1]).log_prob(batch[0]).mean(), arguments, floats(3), floats(2))


@case("nflows")
def nflows_maf(arguments: dict[str, Any]) -> None:
    """Masked autoregressive flow."""
    from nflows.flows.autoregressive import MaskedAutoregressiveFlow

    train(MaskedAutoregressiveFlow(3, 8, 2, 1), likelihood, arguments, floats(3))


@case("normflows")
def normflows_glow(arguments: dict[str, Any]) -> None:
    """Real NVP with masked affine couplings."""
    import normflows as nf

    masks = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    flows = [nf.flows.MaskedAffineFlow(m, nf.nets.MLP([3, 8, 3]), nf.nets.MLP([3, 8, 3])) for m in masks]
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(3), flows)
    train(model, lambda net, batch: net.forward_kld(batch[0]), arguments, floats(3))


@case("snntorch")
def spiking(arguments: dict[str, Any]) -> None:
    """Spiking network of leaky neurons with learned decay."""
    import snntorch as snn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 16), nn.Linear(16, CLASSES)
            self.fire, self.out = snn.Leaky(beta=0.9, learn_beta=True), snn.Leaky(beta=0.8)

        def forward(self, x: Any) -> Any:
            one, two, total = self.fire.init_leaky(), self.out.init_leaky(), 0
            for _ in range(4):
                spikes, one = self.fire(self.first(x), one)
                _, two = self.out(self.second(spikes), two)
                total = total + two
            return total

    train(Net(), classify, arguments, floats(4), labels())


@case("pykan")
def kan(arguments: dict[str, Any]) -> None:
    """Kolmogorov-Arnold network of spline layers."""
    from kan.KANLayer import KANLayer

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = KANLayer(4, 6), KANLayer(6, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.second(self.first(x)[0])[0]

    train(Net(), classify, arguments, floats(4), labels())


@case("siren-pytorch")
def siren(arguments: dict[str, Any]) -> None:
    """Network of sines."""
    from siren_pytorch import SirenNet

    net = SirenNet(dim_in=2, dim_hidden=16, dim_out=CLASSES, num_layers=2)
    train(net, classify, arguments, floats(2), labels())


@case("e3nn")
def equivariant(arguments: dict[str, Any]) -> None:
    """Fully connected tensor product of vectors, equivariant under rotations."""
    from e3nn import o3

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product = o3.FullyConnectedTensorProduct("2x1o", "2x1o", "4x0e + 2x1o")
            self.head = o3.Linear("4x0e + 2x1o", f"{CLASSES}x0e")

        def forward(self, x: Any) -> Any:
            return self.head(self.product(x, x))

    train(Net(), classify, arguments, floats(6), labels())
