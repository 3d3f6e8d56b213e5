"""Fixed random draws, so that a sample run alone and the same sample in a batch compute the same values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self, override

from lightning_dp.per_sample._torch import arguments_of

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


class _InDropout(TorchFunctionMode):
    """A mode that records whether a dropout, or a layer with one, is running, whichever operations it uses on a
    device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _DROPOUTS:
            return func(*args, **(kwargs or {}))
        self.depth += 1
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.depth -= 1


class FrozenRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that replaces every random draw by a fixed value, so that two runs differ only in their samples.

    Dropout is off. Permutations become a cyclic shift, which mixes whatever can be mixed. Other draws of values:

    - by default the same value in every entry (uniform: the quantile ``coin`` of its range; integers likewise; normal:
      ``mean + std / 2``, or two deviations off for a low or high coin; Bernoulli: its probability, or ``coin < p`` for
      a low or high coin), so that a sample sees the same draw alone and in any row of a batch;
    - with ``by_place`` a fixed value for each entry of the drawn tensor, whatever was drawn before, so that a further
      row changes what a mean over rows is (Bernoulli: ``u < p`` with such a value u).

    Draws of places with replacement (multinomial) stay random.

    Args:
        by_place: see above.
        coin: quantile in (0, 1) of every uniform draw: a low and a high one take the branches that a middle one does
            not.
    """

    def __init__(self, *, by_place: bool = False, coin: float = 0.5) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_place, self.coin = by_place, coin
        self.drew = False
        """Whether a value was drawn that another coin would change."""
        self._dropouts = _InDropout()

    @override
    def __enter__(self) -> Self:
        self._dropouts.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @override
    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._dropouts.__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, replacing its random draws."""
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name, arguments = arguments_of(func)
        # arguments that equal their default are not passed on
        named = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
        named |= {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if "dropout_p" in named:
            position = [argument.name for argument in arguments].index("dropout_p")
            if position < len(args):
                args = (*args[:position], 0.0, *args[position + 1 :])
            else:
                kwargs["dropout_p"] = 0.0
            return func(*args, **kwargs)
        if name == "bernoulli" and "p" not in named:
            named["p"] = named["self"].clone()
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or result.is_meta:
            return result
        if self._dropouts.depth:
            return result.fill_(float(named["p"])) if name == "bernoulli" else result
        if name == "randperm":
            return result.copy_(torch.arange(result.numel(), device=result.device).roll(-1))
        uniform = _by_place(result) if self.by_place else None
        value = _value(name, named, uniform, self.coin)
        if value is None:
            return result
        self.drew = True
        return result.copy_(value) if isinstance(value, torch.Tensor) else result.fill_(value)


def _by_place(like: torch.Tensor) -> torch.Tensor:
    """Return fixed numbers in (0, 1) that look drawn, one for each index in row-major order."""
    places = torch.arange(like.numel(), dtype=torch.float64, device=like.device)
    return ((torch.sin(places * 12.9898 + 1.0) * 43758.5453).frac().abs() * 0.98 + 0.01).view(like.shape)


def _value(name: str, named: dict[str, Any], uniform: torch.Tensor | None, coin: float) -> Any:
    """Return the replacement of a draw, or None if it must stay random."""
    u = coin if uniform is None else uniform
    if name in ("randn", "randn_like") or name.startswith("normal"):
        mean, std = named.get("mean", 0.0), named.get("std", 1.0)
        constant = 0.5 if coin == 0.5 else math.copysign(2.0, coin - 0.5)
        standard = constant if uniform is None else math.sqrt(2.0) * torch.erfinv(2.0 * uniform - 1.0)
        return mean + standard * std
    if name in ("rand", "rand_like", "uniform"):
        low, high = named.get("from", 0.0), named.get("to", 1.0)
        return low + (high - low) * u
    if name in ("randint", "randint_like"):
        low, high = named.get("low", 0), named.get("high", named.get("low", 0) + 1)
        return low if coin <= 0.5 else max(low, high - 1)
    if name.startswith("bernoulli"):
        p = named["p"]
        if uniform is None and coin == 0.5:
            return p
        smaller = u < p
        return smaller.to(torch.get_default_dtype()) if isinstance(smaller, torch.Tensor) else float(smaller)
    return None
