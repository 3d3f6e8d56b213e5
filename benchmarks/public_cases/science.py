"""Cases of operators, densities, geometry and other networks of science."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.public_cases.layers import CLASSES, NUM, classify, floats, labels, train, words
from benchmarks.public_cases.registry import BATCH, Task, case, fit


def mse(net: Any, batch: Any) -> Any:
    """Return the mean squared error of outputs and second column."""
    return nn.functional.mse_loss(net(batch[0]), batch[1])


@case("sbi")
def sbi_maf(arguments: dict[str, Any]) -> None:
    """Masked autoregressive flow of a posterior."""
    from sbi.neural_nets.net_builders import build_maf

    net = build_maf(floats(2), floats(3), hidden_features=8, num_transforms=2)
    train(net, lambda net, batch: net.loss(batch[0], batch[1]).mean(), arguments, floats(2), floats(3))


@case("torchdyn")
def torchdyn(arguments: dict[str, Any]) -> None:
    """Neural ODE by Euler's method with a prescribed depth."""
    from torchdyn.core import NeuralODE

    field = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    ode = NeuralODE(field, solver="rk4", sensitivity="autograd", return_t_eval=False)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ode, self.head = ode, nn.Linear(4, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.ode(x, torch.linspace(0, 1, 4))[-1])

    train(Net(), classify, arguments, floats(4), labels())


@case("torchsde")
def latent_sde(arguments: dict[str, Any]) -> None:
    """Stochastic differential equation with learned drift and diffusion."""
    import torchsde

    class Net(nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self) -> None:
            super().__init__()
            self.drift, self.spread, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def f(self, t: Any, y: Any) -> Any:
            return self.drift(y).tanh()

        def g(self, t: Any, y: Any) -> Any:
            return self.spread(y).sigmoid()

        def forward(self, x: Any) -> Any:
            return self.head(torchsde.sdeint(self, x, torch.linspace(0, 1, 3), dt=0.25, method="euler")[-1])

    train(Net(), classify, arguments, floats(4), labels())


@case("se3-transformer-pytorch")
def se3(arguments: dict[str, Any]) -> None:
    """Transformer over points in space, equivariant under rotations and shifts."""
    from se3_transformer_pytorch import SE3Transformer

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = SE3Transformer(dim=8, heads=2, depth=1, dim_head=4, num_degrees=2, valid_radius=10)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, features: Any, places: Any) -> Any:
            mask = torch.ones(features.shape[:2], dtype=torch.bool)
            return self.head(self.body(features, places, mask).mean(1))

    def loss(net: Any, batch: Any) -> Any:
        return nn.functional.cross_entropy(net(batch[0], batch[1]), batch[2])

    train(Net(), loss, arguments, floats(5, 8), floats(5, 3), labels())


@case("pyro-ppl")
def pyro_vae(arguments: dict[str, Any]) -> None:
    """Variational autoencoder under the package's lower bound, per record."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import Trace_ELBO

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

        def model(self, x: Any) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("records", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x: Any) -> None:
            pyro.module("encoder", self.encoder)
            with pyro.plate("records", len(x)):
                mean, spread = self.encoder(x).chunk(2, 1)
                pyro.sample("z", dist.Normal(mean, spread.exp()).to_event(1))

    elbo = Trace_ELBO()
    pyro.clear_param_store()
    train(
        VAE(),
        lambda net, batch: elbo.differentiable_loss(net.model, net.guide, batch[0]) / len(batch[0]),
        arguments,
        floats(6),
    )


@case("bayesian-torch")
def bayesian(arguments: dict[str, Any]) -> None:
    """Layers of sampled weights under a likelihood and a divergence of the weights."""
    from bayesian_torch.layers import LinearReparameterization
    from bayesian_torch.models.dnn_to_bnn import get_kl_loss

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = LinearReparameterization(4, 8), LinearReparameterization(8, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.first(x, return_kl=False).relu(), return_kl=False)

    train(Net(), lambda net, batch: classify(net, batch) + get_kl_loss(net) / NUM, arguments, floats(4), labels())


@case("cebra", refused="to be its gradient when run alone|two axes")
def cebra(arguments: dict[str, Any]) -> None:
    """Embedding of neural activity, whose negatives are the other records."""
    from cebra.models import init
    from cebra.models.criterions import FixedCosineInfoNCE

    net, criterion = init("offset1-model", num_neurons=4, num_units=8, num_output=3), FixedCosineInfoNCE()

    def loss(net: Any, batch: Any) -> Any:
        reference, positive = net(batch[0]), net(batch[1])
        return criterion(reference, positive, positive.roll(1, 0))[0]

    train(net, loss, arguments, floats(4, 1), floats(4, 1))


@case("asteroid")
def conv_tasnet(arguments: dict[str, Any]) -> None:
    """Separation of two voices under a loss of the best permutation."""
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
    from asteroid.models import ConvTasNet

    net = ConvTasNet(n_src=2, n_filters=8, bn_chan=8, hid_chan=8, skip_chan=8, n_blocks=2, n_repeats=1)
    criterion = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")
    train(net, lambda net, batch: criterion(net(batch[0]), batch[1]), arguments, floats(200), floats(2, 200))


@case("asteroid")
def dprnn(arguments: dict[str, Any]) -> None:
    """Separation of two voices by recurrent layers within and between chunks."""
    from asteroid.losses import PITLossWrapper, pairwise_neg_sisdr
    from asteroid.models import DPRNNTasNet

    net = DPRNNTasNet(n_src=2, n_filters=8, kernel_size=4, bn_chan=8, hid_size=8, n_repeats=1, chunk_size=10)
    criterion = PITLossWrapper(pairwise_neg_sisdr, pit_from="pw_mtx")
    train(net, lambda net, batch: criterion(net(batch[0]), batch[1]), arguments, floats(100), floats(2, 100))


@case("geoopt")
def hyperbolic(arguments: dict[str, Any]) -> None:
    """Embedding in a Poincare ball, by a Riemannian optimizer."""
    import geoopt

    ball = geoopt.PoincareBall()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place = geoopt.ManifoldParameter(0.1 * torch.randn(32, 2), manifold=ball)

        def forward(self, pairs: Any) -> Any:
            one, two = self.place[pairs[:, 0]], self.place[pairs[:, 1]]
            return ball.dist(one, two)

    task = Task(Net(), lambda net, batch: (net(batch[0]) - batch[1]).square().mean())
    type(task).configure_optimizers = lambda self: geoopt.optim.RiemannianAdam(self.parameters(), lr=1e-3)
    fit(task, DataLoader(TensorDataset(words(2), torch.rand(NUM)), batch_size=BATCH), arguments)
