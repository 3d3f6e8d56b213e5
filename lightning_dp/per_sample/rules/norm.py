"""Rules for normalisation layers that treat every sample separately: LayerNorm, RMSNorm, GroupNorm, InstanceNorm.

    y = x_hat * weight + bias,   grad_weight_i = sum_positions backprop_i * x_hat_i,   grad_bias_i = sum backprop_i

where ``x_hat`` is the normalised input. Only products and sums: per-sample gradients are as small as the parameters.
BatchNorm has no rule: its ``x_hat`` mixes samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.per_sample.rules.base import Call, Rule, sum_rows, widen


class _ScaleAndShiftRule(Rule):
    """Per-sample gradients of an elementwise scale and shift that follow a normalisation."""

    @abstractmethod
    def normalized(self, module: nn.Module, activation: Tensor) -> Tensor:
        """Return the input after normalisation, before scale and shift, in its accumulation dtype."""

    @abstractmethod
    def reduced(self, module: nn.Module, rows: Tensor, batch_size: int) -> Tensor:
        """Add all entries of one sample that use the same parameter entry: ``(B * K, ...) -> (B, *shape)``."""

    @override
    def per_sample(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        if batch_size == 0:
            return {
                name: widen(calls[0].backprop).new_zeros(0, *module.get_parameter(name).shape) for name in sorted(names)
            }
        grads: dict[str, Tensor] = {}
        for call in calls:
            backprop = widen(call.backprop)
            for name in sorted(names):
                # the normalised input is a tensor of its own: a product in place saves a large temporary
                rows = backprop if name == "bias" else self.normalized(module, call.activation).mul_(backprop)
                grad = self.reduced(module, rows, batch_size)
                grads[name] = grads[name] + grad if name in grads else grad
        return grads


class _TrailingAxesRule(_ScaleAndShiftRule):
    """A rule for parameters over the last axes; all axes between them and the batch axis are positions."""

    @override
    def follows(self, spec: Any, axis: int, num_axes: int) -> bool:
        return axis < num_axes - len(spec.normalized_shape)

    @override
    def reduced(self, module: nn.Module, rows: Tensor, batch_size: int) -> Tensor:
        shape = module.normalized_shape
        assert isinstance(shape, tuple)
        return rows.reshape(batch_size, -1, *shape).sum(1)


class _ChannelAxisRule(_ScaleAndShiftRule):
    """A rule for parameters with one entry per channel (axis 1); all later axes are positions."""

    @override
    def reduced(self, module: nn.Module, rows: Tensor, batch_size: int) -> Tensor:
        return rows.reshape(batch_size, rows.shape[0] // batch_size, rows.shape[1], -1).sum((1, 3))


class LayerNormRule(_TrailingAxesRule):
    """Per-sample gradients of ``nn.LayerNorm`` for any ``normalized_shape``.

    Example:
        >>> import torch
        >>> layer, x = nn.LayerNorm(3), torch.randn(2, 5, 3)
        >>> call = Call(inputs=(), kwargs={}, activation=x, backprop=torch.ones(2, 5, 3))
        >>> LayerNormRule().per_sample(layer, [call], 2, {"bias"})["bias"]
        tensor([[5., 5., 5.],
                [5., 5., 5.]])
    """

    @override
    def normalized(self, module: nn.Module, activation: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return F.layer_norm(widen(activation), module.normalized_shape, None, None, module.eps)


class RMSNormRule(_TrailingAxesRule):
    """Per-sample gradients of ``nn.RMSNorm``.

    Without ``eps`` the layer's epsilon depends on the type of its input: the input is then normalised in that type.
    """

    @override
    def normalized(self, module: nn.Module, activation: Tensor) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        x = activation if module.eps is None else widen(activation)
        return widen(F.rms_norm(x, list(module.normalized_shape), None, module.eps))


class GroupNormRule(_ChannelAxisRule):
    """Per-sample gradients of ``nn.GroupNorm``.

    On a CPU torch's own backward of the layer computes the gradients, with the channels of all samples as the channels
    of one sample. Neither the normalised input nor its product with the backprop is materialized.
    """

    @override
    def per_sample(
        self, module: nn.Module, calls: Sequence[Call], batch_size: int, names: set[str]
    ) -> dict[str, Tensor]:
        if "weight" not in names or calls[0].backprop.device.type != "cpu" or not calls[0].backprop.numel():
            return super().per_sample(module, calls, batch_size, names)
        assert isinstance(module, nn.GroupNorm)
        grads: dict[str, Tensor] = {}
        for call in calls:
            made = zip(("weight", "bias"), _group_norm_gradients(module, call), strict=True)
            for name, grad in made:
                if name in names:
                    grads[name] = grads[name] + grad if name in grads else grad
        return grads

    @override
    def normalized(self, module: nn.Module, activation: Tensor) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(widen(activation), module.num_groups, None, None, module.eps)


class InstanceNormRule(_ChannelAxisRule):
    """Per-sample gradients of ``nn.InstanceNorm1d/2d/3d``.

    Running statistics are constants in evaluation mode and are used as such; the rule never updates them.
    """

    @override
    def normalized(self, module: nn.Module, activation: Tensor) -> Tensor:
        assert isinstance(module, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))
        x = widen(activation)
        if module.training or not module.track_running_stats:
            return F.instance_norm(x, use_input_stats=True, eps=module.eps)
        assert module.running_mean is not None
        assert module.running_var is not None
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x - module.running_mean.reshape(shape)) / (module.running_var.reshape(shape) + module.eps).sqrt()


def _group_norm_gradients(module: nn.GroupNorm, call: Call) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and bias, ``(B, C)`` each, of one call."""
    # the kernels read memory in order; a reshape of one row may leave other strides
    x, backprop = widen(call.activation).contiguous(), widen(call.backprop).contiguous()
    rows, channels, groups = x.shape[0], x.shape[1], module.num_groups
    positions = x[0, 0].numel()
    _, means, scales = torch.ops.aten.native_group_norm(x, None, None, rows, channels, positions, groups, module.eps)
    flat = (1, rows * channels, positions)
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        backprop.reshape(flat),
        x.reshape(flat),
        means.reshape(1, -1),
        scales.reshape(1, -1),
        x.new_ones(rows * channels),
        *flat,
        rows * groups,
        [False, True, True],
    )
    return tuple(sum_rows(grad.view(rows, channels), call.multiplicity) for grad in (weight, bias))  # type: ignore[return-value]
