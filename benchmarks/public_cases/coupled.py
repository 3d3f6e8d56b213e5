"""Cases of models that are coupled by nature."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.public_cases.layers import CLASSES, floats, labels, train
from benchmarks.public_cases.registry import case


@case("pytorch-metric-learning", refused="contrastive|Samples influence each other")
def triplets(arguments: dict[str, Any]) -> None:
    """Triplet loss over the pairs of a batch."""
    from pytorch_metric_learning.losses import TripletMarginLoss

    criterion = TripletMarginLoss()
    train(nn.Linear(4, 8), lambda net, batch: criterion(net(batch[0]), batch[1]), arguments, floats(4), labels())


@case("pytorch-metric-learning")
def proxies(arguments: dict[str, Any]) -> None:
    """Normalized softmax loss with a learned proxy per class."""
    from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.loss = nn.Linear(4, 8), NormalizedSoftmaxLoss(CLASSES, 8)

        def forward(self, x: Any, y: Any) -> Any:
            return self.loss(self.body(x), y)

    train(Net(), lambda net, batch: net(*batch), arguments, floats(4), labels())


@case("lightly", refused="contrastive|influence each other")
def ntxent(arguments: dict[str, Any]) -> None:
    """SimCLR: negatives are other records."""
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss()
    train(
        nn.Linear(4, 8), lambda net, batch: criterion(net(batch[0]), net(batch[0] + batch[1])), arguments, floats(4),
        0.1 * floats(4),
    )  # fmt: skip


@case("lightly")
def simsiam(arguments: dict[str, Any]) -> None:
    """SimSiam's similarity of two views, without batch norm."""
    from lightly.loss import NegativeCosineSimilarity

    criterion = NegativeCosineSimilarity()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.predict = nn.Linear(4, 8), nn.Linear(8, 8)

        def forward(self, one: Any, other: Any) -> Any:
            first, second = self.body(one), self.body(other)
            left, right = self.predict(first), self.predict(second)
            return 0.5 * (criterion(left, second.detach()) + criterion(right, first.detach()))

    train(Net(), lambda net, batch: net(batch[0], batch[0] + batch[1]), arguments, floats(4), 0.1 * floats(4))


@case("gpytorch", refused="each sample meets all others")
def gaussian_process(arguments: dict[str, Any]) -> None:
    """Exact Gaussian process: a covariance of all records."""
    import gpytorch

    class Net(gpytorch.models.ExactGP):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(None, None, gpytorch.likelihoods.GaussianLikelihood())
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x: Any) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def loss(net: Any, batch: Any) -> Any:
        net.set_train_data(batch[0], batch[1], strict=False)
        marginal = gpytorch.mlls.ExactMarginalLogLikelihood(net.likelihood, net)
        return -marginal(net(batch[0]), batch[1])

    train(Net(), loss, arguments, floats(2), torch.randn(64))


@case("gpytorch")
def variational_gp(arguments: dict[str, Any]) -> None:
    """Sparse variational Gaussian process with learned inducing points."""
    import gpytorch

    class Net(gpytorch.models.ApproximateGP):  # type: ignore[misc]
        def __init__(self) -> None:
            points = torch.randn(5, 2)
            inner = gpytorch.variational.CholeskyVariationalDistribution(5)
            super().__init__(gpytorch.variational.VariationalStrategy(self, points, inner))
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
            self.likelihood = gpytorch.likelihoods.GaussianLikelihood()

        def forward(self, x: Any) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def loss(net: Any, batch: Any) -> Any:
        bound = gpytorch.mlls.VariationalELBO(net.likelihood, net, num_data=64)
        return -bound(net(batch[0]), batch[1])

    train(Net(), loss, arguments, floats(2), torch.randn(64))


@case("pytorch-tabnet", refused="BatchNorm")
def tabnet(arguments: dict[str, Any]) -> None:
    """TabNet with ghost batch norm."""
    from pytorch_tabnet.tab_network import TabNet

    net = TabNet(4, CLASSES, n_d=4, n_a=4, n_steps=2, virtual_batch_size=8, group_attention_matrix=torch.eye(4))

    def loss(net: Any, batch: Any) -> Any:
        output, sparsity = net(batch[0])
        return nn.functional.cross_entropy(output, batch[1]) - 1e-3 * sparsity

    train(net, loss, arguments, floats(4), labels())
