"""The claims that ``claims.py`` tries, each with its arms, its grid of rates and its comparisons."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.runs import Run


@dataclass(frozen=True)
class Study:
    """One claim and the arms that test it.

    Args:
        claim: what the paper says.
        setting: of the runs.
        arms: name -> run at any rate.
        grid: learning rates, the same for every arm.
        pairs: (arm, its control, and the sign that the difference has if the claim holds).
    """

    claim: str
    setting: str
    arms: dict[str, Run]
    grid: tuple[float, ...]
    pairs: tuple[tuple[str, str, int], ...]


FLAT = Run("fashion_mnist", "tanh mlp", 6, 1024, 1.0, epsilon=3.0)
WIDE = Run("fashion_mnist", "wide cnn", 5, 2048, 1.0, epsilon=3.0, decay=True)
SWITCH = Run("fashion_mnist", "tanh mlp", 6, 1024, 1.0, sigma=2.0)
PRUNE = Run("fashion_mnist", "mlp 64", 4, 2048, 1.0, epsilon=3.0, decay=True)
SCHEDULES = (
    "noise step .85",
    "noise time .1",
    "noise linear .5",
    "noise exponential .1",
    "auto threshold 3",
    "quantile .5",
)
VOTES = Run("mnist", "tanh mlp 16", 4, 1024, 1.0, epsilon=3.0)


def _sparse(epsilon: float) -> Study:
    dense = WIDE.but(epsilon=epsilon)
    return Study(
        "Random sparsification with gradual cooling to .9 beats dense DP-SGD with its best schedule of the rate (Zhu "
        "& Blaschko 2023).",
        f"epsilon {epsilon:g}, convolutional network of 509,226 parameters, batch 2,048, 5 epochs (the paper: 48); the "
        "claim holds only if it does against both schedules of the dense rate.",
        {
            "dense, rate to 0": dense,
            "dense, constant rate": dense.but(decay=False),
            "sparse .9": dense.but(decay=False, method="sparse .9"),
        },
        (4.0, 8.0, 16.0),
        (("sparse .9", "dense, rate to 0", 1), ("sparse .9", "dense, constant rate", 1)),
    )


PRUNED = (0.5, 0.9, 0.98)


def _pruning(
    width: int, shares: tuple[float, ...] = PRUNED, grid: tuple[float, ...] = (1.0, 2.0, 4.0), method: str = "prune"
) -> Study:
    dense = PRUNE.but(network=f"mlp {width}", lr=16.0)  # the rate where the grid is empty
    return Study(
        "Heavy pruning before training helps large networks (Watson et al. 2023).",
        f"perceptron 784-{width}-{width}-10, batch 2,048, 4 epochs, epsilon 3; the weights smallest at the start "
        + ("of each layer " if "layer" in method else "")
        + "are removed.",
        {"dense": dense, **{f"{share:g} pruned": dense.but(method=f"{method} {share:g}") for share in shares}},
        grid,
        tuple((f"{share:g} pruned", "dense", 1) for share in shares),
    )


def _schedules(title: str, flat: Run, grid: tuple[float, ...]) -> Study:
    return Study(
        "A noise multiplier that decays, or a threshold learned from released values, beats constant ones at the same "
        "epsilon (sound variants of Auto DP-SGD, Chilukoti et al. 2023).",
        f"{title}perceptron 784-128-10 with tanh, batch 1,024, 6 epochs, epsilon 3.",
        {"flat": flat, **{name: flat.but(method=name) for name in SCHEDULES}},
        grid,
        tuple((name, "flat", 1) for name in SCHEDULES),
    )


STUDIES = {
    "sparsification at epsilon 3": _sparse(3.0),
    "stages": Study(
        "Later epochs decide: privacy in the second half of a run costs more than in the first (Watson et al. 2023).",
        "perceptron 784-128-10 with tanh, batch 1,024, 6 epochs, sigma 2 where private, one rate for both "
        "halves; only the arm that is private throughout is a private run.",
        {
            "private throughout": SWITCH,
            "never private": SWITCH.but(sigma=None),
            "private in the second half": SWITCH.but(method="private from 3"),
            "private in the first half": SWITCH.but(method="private until 3"),
        },
        (0.5, 1.0, 2.0),
        (("private in the second half", "private in the first half", -1),),
    ),
    "schedules": _schedules("", FLAT, (1.0, 2.0, 4.0)),
    "stages with two rates": Study(
        "Later epochs decide: the later the non-private epochs are, the less privacy costs (Watson et al. 2023).",
        "the network, batch and sigma of stages; the rate of private epochs is 16 times that of the others, as in the "
        "best rates of the two arms that never switch; the grid holds the rate of the non-private epochs.",
        {
            f"private {when} epoch {epoch}": SWITCH.but(method=f"private {when} {epoch}x16")
            for when in ("from", "until")
            for epoch in (1, 3, 5)
        },
        (0.125, 0.25, 0.5),
        tuple((f"private from epoch {6 - epoch}", f"private until epoch {epoch}", -1) for epoch in (1, 3, 5)),
    ),
    "parts": Study(
        "Clipping hurts more than noise (Watson et al. 2023).",
        "the network, batch and sigma of stages; with one of the two switched off the runs are not private.",
        {
            "clipping and noise": SWITCH,
            "clipping only": SWITCH.but(sigma=0.0),
            "noise only": SWITCH.but(clipping="none"),
        },
        (0.5, 1.0, 2.0),
        (("clipping only", "noise only", -1),),
    ),
    "sparsification at epsilon 1": _sparse(1.0),
    **{f"pruning at width {width}": _pruning(width) for width in (64, 256, 512, 1024)},
    # .98 was at chance at all smaller widths; the best rates of arms that learned were 4, 8 and 16
    "pruning at width 2048": _pruning(2048, (0.5, 0.9), (4.0, 8.0, 16.0)),
    "pruning at width 4096": _pruning(4096, (0.5,), ()),
    "pruning each layer at width 1024": _pruning(1024, (0.9, 0.98), (4.0, 8.0, 16.0), "prune each layer"),
    "schedules on MNIST": _schedules("MNIST, ", FLAT.but(data="mnist"), (2.0, 4.0, 8.0)),
    "votes": Study(
        "Votes on the coordinates in which a gradient is largest (TopAgg, Wang et al. 2021) beat clipped gradients in "
        "DP-SGD.",
        "MNIST, perceptron 784-16-10 with tanh, 12,730 weights, batch 1,024, 4 epochs, epsilon 3; each record votes on "
        "a tenth of the weights with stochastic signs.",
        {
            "flat": VOTES,
            "votes": VOTES.but(clipping="top .1"),
        },
        (2.0, 4.0, 8.0),
        (("votes", "flat", 1),),
    ),
}
