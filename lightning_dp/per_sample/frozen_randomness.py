"""Fixed random draws, so that a sample run alone and the same sample in a batch compute the same values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self, override

from lightning_dp.per_sample._torch import arguments_of, unfollowed

_DROPOUTS = {
    getattr(owner, name)
    for owner, names in (
        (torch, "dropout dropout_ alpha_dropout alpha_dropout_ feature_dropout feature_dropout_"),
        (torch, "feature_alpha_dropout feature_alpha_dropout_"),
        (F, "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"),
        (F, "scaled_dot_product_attention multi_head_attention_forward"),
        (torch, "lstm gru rnn_tanh rnn_relu"),
    )
    for name in names.split()
}


_NARROW = frozenset({torch.bfloat16, torch.float16})

_BLOCK = 4099
"""Distance of the indices of two blocks of rows, beyond the number of samples of any trial batch."""

#: Draws of which the values of one sample decide how many random numbers are left for the others.
REJECTING = frozenset({"binomial", "poisson", "_standard_gamma", "_sample_dirichlet", "rrelu_with_noise"})


class UnfrozenDrawError(Exception):
    """User code has drawn random numbers where none were expected, so that they were not frozen."""


class _InDropout(TorchFunctionMode):
    """A mode that counts the running dropout functions and functions that contain a dropout, and watches precision."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.given: Any = None
        """First argument of the innermost of these functions."""
        self.is_narrow = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _DROPOUTS:
            out = func(*args, **kwargs)
            self.is_narrow |= isinstance(out, Tensor) and out.dtype in _NARROW and out.requires_grad
            return out
        before, self.given = self.given, args[0] if args else kwargs.get("input")
        self.depth += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.depth, self.given = self.depth - 1, before


class FrozenRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that replaces random draws by fixed values, so that two runs differ only in their samples.

    Dropout is off. Random slopes of ``rrelu`` are one quantile of their range. Permutations become a cyclic shift,
    which mixes whatever can be mixed. Other draws of values:

    - by default the same value in every entry (uniform: the quantile ``coin`` of its range; integers likewise; normal:
      ``mean + std / 2``, or two deviations off for a low or high coin; Bernoulli: its probability, or ``coin < p`` for
      a low or high coin), so that a sample sees the same draw alone and in any row of a batch;
    - with ``by_place`` a fixed value for each entry of the drawn tensor, whatever was drawn before, so that a further
      row changes what a mean over rows is (Bernoulli: ``u < p`` with such a value u). Dropout drops each entry of 1,
      since dropout of ones makes a mask. With ``block``, an entry's row in its block and the block decide its value.

    - Exponential, Cauchy, geometric, Poisson, binomial, gamma and Dirichlet draws follow the same rule, by a
      quantile or a value near the mean. So do draws of places by weights (multinomial).

    Draws of places in one vector of weights, without replacement, stay random: they may be rows of the batch.

    Args:
        by_place: see above.
        coin: quantile in (0, 1) of every uniform draw: a low and a high one take the branches that a middle one does
            not.
        only: names of the draws to replace; None for all.
        rates: scale by the root of its probability what dropout and Bernoulli draws keep, so that a change of their
            rate shows; else a middle coin hides it.
        by_content: dropout drops an entry by its value alone, so that the order of the rows changes nothing, unless
            that would drop all or nothing. Dropout within a kernel is off.
        block: number of samples, of which drawn tensors may hold several copies one after the other; 0 for no blocks.
        by_column: entries of a drawn tensor differ along its last axis if it has others, near a low or high coin, or
            all over the range for a middle one.
    """

    def __init__(
        self,
        *,
        by_place: bool = False,
        coin: float = 0.5,
        only: Container[str] | None = None,
        rates: bool = False,
        by_content: bool = False,
        block: int = 0,
        by_column: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_place, self.coin, self._only, self._rates = by_place, coin, only, rates
        self._by_content, self._block, self._by_column = by_content, block, by_column
        self.has_draws = False
        """Whether any operation drew random numbers."""
        self.drew = False
        """Whether a value was drawn that another coin would change."""
        self.communicated = False
        """Whether this process took part in a collective of ``torch.distributed``."""
        self._dropouts = _InDropout()

    @property
    def is_narrow(self) -> bool:
        """True if a gradient flows through numbers of 16 bits, as under the user's own ``torch.autocast``."""
        return self._dropouts.is_narrow

    @override
    def __enter__(self) -> Self:
        self._dropouts.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @override
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._dropouts.__exit__(*error)  # type: ignore[no-untyped-call]

    def run(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation with its random draws replaced."""
        kwargs = kwargs or {}
        draws, communicates = _kind_of(func)
        with unfollowed():  # traced code has shown its operations to nobody, as it does without this mode
            if draws:
                self.has_draws = True
                return self._run_draw(func, args, dict(kwargs))
            self.communicated |= communicates
            return func(*args, **kwargs)

    def _run_draw(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name, arguments = arguments_of(func)
        in_dropout = self._dropouts.depth > 0 and name.startswith("bernoulli")
        if self._only is not None and name not in self._only:
            drops = in_dropout or "dropout" in name or any(argument.name == "dropout_p" for argument in arguments)
            if not (self._by_content and drops):
                return func(*args, **kwargs)
        # arguments that equal their default are not passed on
        named = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        named |= {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        if name == "native_dropout":
            p = max(1.0 - named["p"], 1e-30)
            weights = self._weights(args[0], p, args[0].new_empty(args[0].shape).bernoulli_(p)) / p
            return args[0] * (weights * p**0.5 if self._rates else weights), weights != 0
        if self._rates and name == "bernoulli":
            named["p"] = named.get("p", args[0]) ** 1.5  # which the caller divides by the probability
        if "dropout_p" in named:
            position = [argument.name for argument in arguments].index("dropout_p")
            if position < len(args):
                args = (*args[:position], 0.0, *args[position + 1 :])
            else:
                kwargs["dropout_p"] = 0.0
            return func(*args, **kwargs)
        if name == "rrelu_with_noise":
            slope = named["lower"] + self.coin * (named["upper"] - named["lower"])
            return func(*args[:2], slope, slope, named["training"])
        if name == "bernoulli" and "p" not in named:
            named["p"] = named["self"].clone()
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or result.is_meta:
            return result
        if self._dropouts.depth:
            return result.copy_(self._weights(self._dropouts.given, named["p"], result)) if in_dropout else result
        if name == "randperm":
            return result.copy_(torch.arange(result.numel(), device=result.device).roll(-1))
        uniform = _by_place(result, self._block) if self.by_place else None
        if self._by_column and result.dim() > 1:
            uniform = _by_place(result.new_empty(result.shape[-1]), 0)
            uniform = uniform if self.coin == 0.5 else self.coin + (uniform - 0.5) / 100
        value = _value(name, named, uniform, self.coin, result)
        if value is None:
            return result
        self.drew = True
        return result.copy_(value) if isinstance(value, torch.Tensor) else result.fill_(value)

    def _weights(self, given: Any, p: float, drawn: Tensor) -> Tensor:
        """Return what a dropout draws for its entries instead of 1 with probability p and 0: p, or by content."""
        values = _shrunk(given, drawn.shape) if self.by_place or self._by_content else None
        if values is None:
            return torch.full_like(drawn, float(p))
        if not self._by_content:
            return (values.abs() != 1).to(drawn.dtype) * p
        stays = _by_value(values) < p
        some = stays[values != 0]
        # values that would all be kept or all be dropped are too few to go by
        return drawn if some.all() or not some.any() else stays.to(drawn.dtype)


# Set here: torch wraps a method that a class defines by this name, to keep it from being compiled, and each call would
# pay for that. Trials run eagerly.
FrozenRandomness.__torch_dispatch__ = FrozenRandomness.run  # type: ignore[assignment, method-assign]


@functools.cache
def _kind_of(func: Any) -> tuple[bool, bool]:
    """Tell whether an operation draws random numbers, and whether processes communicate by it."""
    return torch.Tag.nondeterministic_seeded in func.tags, func.namespace == "c10d"


def _by_place(like: torch.Tensor, block: int) -> torch.Tensor:
    """Return fixed numbers in (0, 1) that look random; the index of each entry determines its number, not the shape:
    the samples may be along any axis. Along the first axis of whole blocks, the index is that within the block, and
    that of the block.
    """
    angles = torch.ones((), dtype=torch.float64, device=like.device)
    folds = block > 0
    for axis, size in enumerate(like.shape):
        places = torch.arange(size, device=like.device)
        if folds and size % block == 0:
            places, folds = places % block + places // block * _BLOCK, False
        angles = angles.unsqueeze(-1) + places * (12.9898 * math.e**axis)
    return (torch.sin(angles) * 43758.5453).frac().abs() * 0.98 + 0.01


def _shrunk(given: Any, shape: torch.Size) -> Tensor | None:
    """Return a tensor with the largest entry along each axis that has length 1 in a shape; None if it does not fit."""
    if not isinstance(given, Tensor) or given.dim() != len(shape):
        return None
    axes = [axis for axis, size in enumerate(shape) if size == 1]
    given = given.detach().amax(axes, keepdim=True) if axes else given.detach()
    return given if given.shape == shape else None


def _by_value(values: Tensor) -> Tensor:
    """Return a fixed number in (0, 1) for each entry, which its value to six bits determines."""
    fraction, exponent = torch.frexp(values.double())
    return (torch.sin((fraction * 64).round() * 12.9898 + exponent * 78.233) * 43758.5453).frac().abs()


def _value(name: str, named: dict[str, Any], uniform: torch.Tensor | None, coin: float, drawn: torch.Tensor) -> Any:
    """Return the replacement of a draw, or None if it must stay random."""
    u = coin if uniform is None else uniform
    if name.startswith("normal") or name in ("randn", "randn_like", "log_normal"):
        mean, std = named.get("mean", 0.0), named.get("std", 1.0)
        constant = 0.5 if coin == 0.5 else math.copysign(2.0, coin - 0.5)
        standard = constant if uniform is None else math.sqrt(2.0) * torch.erfinv(2.0 * uniform - 1.0)
        normal = mean + standard * std
        return torch.as_tensor(normal).exp() if name == "log_normal" else normal
    if name in ("rand", "rand_like", "uniform"):
        low, high = named.get("from", 0.0), named.get("to", 1.0)
        return low + (high - low) * u
    if name in ("randint", "randint_like") or (name == "random" and named.get("to") is not None):
        low = named.get("low", named.get("from", 0))
        high = named.get("high", named.get("to", low + 1))
        if uniform is not None:
            return low + (uniform * (high - low)).floor()
        return low if coin <= 0.5 else max(low, high - 1)
    if name.startswith("bernoulli"):
        p = named["p"]
        if uniform is None and coin == 0.5:
            return p
        smaller = u < p
        return smaller.to(torch.get_default_dtype()) if isinstance(smaller, torch.Tensor) else float(smaller)
    if name in _QUANTILES:
        return _QUANTILES[name](torch.as_tensor(u, dtype=torch.float64), named)
    if name == "multinomial" and (named["self"].dim() == 2 or named.get("replacement", False)):
        return _drawn_places(named["self"].double(), torch.as_tensor(u, dtype=torch.float64), drawn, named)
    return None


#: Other draws of values -> a quantile u of them; of gamma, Dirichlet, Poisson and binomial ones, a value near the mean.
_QUANTILES: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "exponential": lambda u, named: -torch.log1p(-u) / named.get("lambd", 1.0),
    "cauchy": lambda u, named: named.get("median", 0.0) + named.get("sigma", 1.0) * torch.tan(math.pi * (u - 0.5)),
    "geometric": lambda u, named: (torch.log1p(-u) / math.log1p(-min(named["p"], 1 - 1e-12))).ceil().clamp_min(1),
    "poisson": lambda u, named: (named["self"].double() + u).floor(),
    "binomial": lambda u, named: torch.minimum((named["count"] * named["prob"]).double() + u, named["count"]).floor(),
    "_standard_gamma": lambda u, named: named["self"].double() * (0.5 + u),
    "_sample_dirichlet": lambda u, named: named["self"].double() / named["self"].double().sum(-1, keepdim=True),
}


def _drawn_places(weights: Tensor, u: Tensor, drawn: Tensor, named: dict[str, Any]) -> Tensor:
    """Return places of each row: the quantile u of its weights, or the largest weights without replacement."""
    if not named.get("replacement", False) and drawn.shape[-1] > 1:
        return weights.topk(drawn.shape[-1], -1).indices.sort(-1).values.roll(-1, -1)  # mixes whatever can be mixed
    shares = weights.cumsum(-1)
    return torch.searchsorted(shares, u * shares[..., -1:].expand(drawn.shape)).clamp_max(weights.shape[-1] - 1)
