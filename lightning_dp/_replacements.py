"""The layers that ``fix`` puts in, and how each is made from the one that it replaces. Imported when ``fix`` is called."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class _Exchange(NamedTuple):
    old: nn.Module  # kept alive: its id is a key
    new: nn.Module


def replace(module: nn.Module, changes: list[str]) -> nn.Module:
    """Exchange layers inside the module, add a sentence for each to ``changes``, and return the module or its replacement."""
    return _exchanged(module, "", {}, changes)


def _exchanged(module: nn.Module, name: str, done: dict[int, _Exchange], changes: list[str]) -> nn.Module:
    """Return what stands in for the module, its submodules exchanged; a module met twice is exchanged once."""
    if id(module) in done:
        return done[id(module)].new
    replacement, change = _replaced(module, name)
    done[id(module)] = _Exchange(module, replacement)
    if change:
        changes.append(f"{name or 'the module itself'}: {type(module).__name__} {change}")
    if replacement is not module:
        replacement.train(module.training)
        if any(hooks for attribute, hooks in vars(module).items() if attribute.endswith("_hooks")):
            changes[-1] += "; hooks registered on it were not carried over"
        return replacement
    for child_name, child in [*module._modules.items()]:
        if child is not None:
            path = f"{name}.{child_name}" if name else child_name
            module._modules[child_name] = _exchanged(child, path, done, changes)
    if isinstance(module, nn.TransformerEncoder) and any(type(m) is SplitMultiheadAttention for m in module.modules()):
        module.use_nested_tensor = False  # a path of evaluation for the original attention only
    return module


def _replaced(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that stands in for this one (itself where nothing is to be done) and what changed."""
    parameters = list(module.parameters(recurse=False))
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(is_lazy(p) for p in parameters):
        raise ValueError(
            f"Expected layers with initialised parameters, got {name or 'module'}={type(module).__name__} without. Run "
            "the module on a batch once before fix."
        )
    trains = any(parameter.requires_grad for parameter in module.parameters())
    if type(module) in _BATCH_NORMS:
        norm = cast(nn.BatchNorm2d, module)
        return _group_norm(norm) if trains or norm.training or norm.running_mean is None else (norm, "")
    if type(module) in _INSTANCE_NORMS:
        return _without_statistics(cast(nn.InstanceNorm2d, module), trains)
    if not trains:
        return module, ""
    if type(module) in (nn.LSTM, nn.GRU, nn.RNN) and not module.proj_size:
        return _recurrent(cast(nn.RNNBase, module))
    if type(module) is nn.MultiheadAttention:
        return _attention(module)
    return module, ""


def _num_groups(norm: nn.BatchNorm2d) -> int:
    """At most 32 groups of at least 2 channels, or 16 where an input may have no positions to normalise over."""
    num_groups = math.gcd(32, norm.num_features)
    least = 16 if isinstance(norm, nn.BatchNorm1d) else 2
    while num_groups > 1 and norm.num_features // num_groups < least:
        num_groups //= 2
    return num_groups


def _group_norm(norm: nn.BatchNorm2d) -> tuple[nn.Module, str]:
    channels, groups = norm.num_features, _num_groups(norm)
    made = _like(norm, nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine))
    change = f"became GroupNorm with {groups} groups of {channels // groups} channels"
    if norm.affine:
        made.load_state_dict({name: parameter.detach() for name, parameter in norm.named_parameters()})
        change += "; weight and bias carried over"
    if norm.running_mean is not None:
        change += "; running statistics dropped: outputs differ, train or fine-tune"
    return made, change


def _without_statistics(norm: nn.InstanceNorm2d, trains: bool) -> tuple[nn.Module, str]:
    if not norm.track_running_stats or not (trains or norm.training):
        return norm, ""
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return norm, "no longer tracks running statistics; it normalises with the sample's own in evaluation too"


def _recurrent(layer: nn.RNNBase) -> tuple[nn.Module, str]:
    made_by: dict[type[nn.Module], Callable[..., nn.Module]] = {nn.LSTM: DPLSTM, nn.GRU: DPGRU, nn.RNN: DPRNN}
    dropout = layer.dropout if layer.num_layers > 1 else 0.0
    options: dict[str, str] = {"nonlinearity": layer.nonlinearity} if isinstance(layer, nn.RNN) else {}
    made = made_by[type(layer)](
        layer.input_size,
        layer.hidden_size,
        num_layers=layer.num_layers,
        bias=layer.bias,
        batch_first=layer.batch_first,
        dropout=dropout,
        bidirectional=layer.bidirectional,
        **options,
    )
    _like(layer, made).load_state_dict(layer.state_dict())
    change = f"became opacus' {type(made).__name__}; weights carried over, same outputs"
    if dropout:
        change += f"; dropout={dropout} now acts on the hidden state at every step and on the last layer too"
    return made, change


def _attention(layer: nn.MultiheadAttention) -> tuple[nn.Module, str]:
    made = SplitMultiheadAttention(
        layer.embed_dim,
        layer.num_heads,
        dropout=layer.dropout,
        bias=layer.in_proj_bias is not None,
        add_bias_kv=layer.bias_k is not None,
        add_zero_attn=layer.add_zero_attn,
        kdim=layer.kdim,
        vdim=layer.vdim,
        batch_first=layer.batch_first,
    )
    _like(layer, made).load_state_dict(layer.state_dict())
    trains = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
    for letter, linear in (("q", made.qlinear), ("k", made.klinear), ("v", made.vlinear)):
        linear.weight.requires_grad_(trains.get(f"{letter}_proj_weight", trains.get("in_proj_weight")))
        if linear.bias is not None:
            linear.bias.requires_grad_(trains["in_proj_bias"])
    for letter in "kv" if layer.bias_k is not None else "":
        made.get_parameter(f"seq_bias_{letter}.bias").requires_grad_(trains[f"bias_{letter}"])
    return made, "became an attention made of Linear layers; weights carried over, same outputs"


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give the new module the old one's device, type and, for parameters of the same name, ``requires_grad``."""
    some = next(old.parameters(), next(old.buffers(), None))
    if some is not None:
        new.to(device=some.device, dtype=some.dtype)
    trains = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trains.get(name, parameter.requires_grad))
    return new


class SplitMultiheadAttention(DPMultiheadAttention):  # type: ignore[misc]
    """Multi-head attention, called as ``nn.MultiheadAttention``, whose projections are ``nn.Linear`` modules.

        softmax(q k^T / sqrt(d) + mask) v,   q = query W_q^T + b_q, ...

    It adds to opacus' layer what that leaves out: masks with ``batch_first=True``, ``is_causal``,
    ``average_attn_weights``, inputs without a batch axis and any floating type.

    **Guarantee**: the same outputs as ``nn.MultiheadAttention`` with the same weights, apart from dropout's draws.

    Example:
        >>> layer = SplitMultiheadAttention(8, 2, batch_first=True)
        >>> out, weights = layer(*[torch.randn(4, 5, 8)] * 3)
        >>> out.shape, weights.shape
        (torch.Size([4, 5, 8]), torch.Size([4, 5, 5]))
    """

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments, shapes and masks (True or -inf: do not attend) as in ``nn.MultiheadAttention``."""
        if is_causal and attn_mask is None:
            raise ValueError(f"Expected attn_mask beside is_causal, got is_causal={is_causal}. Pass the causal mask.")
        has_batch = query.dim() == 3
        if not has_batch:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

        q, k, v = self.qlinear(query), self.klinear(key), self.vlinear(value)
        if self.add_bias_kv:
            k = self.seq_bias_k(k.transpose(0, 1)).transpose(0, 1)
            v = self.seq_bias_v(v.transpose(0, 1)).transpose(0, 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        # (B, T, E) -> (B, heads, T, head_dim)
        q, k, v = (each.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for each in (q, k, v))
        mask = self._merged_mask(attn_mask, key_padding_mask, q, k.shape[2])

        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.mT
            weights = self.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1))
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            dropout = self.dropout.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not has_batch:
            return out[0], None if weights is None else weights[0]
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _merged_mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, source: int
    ) -> Tensor | None:
        """Return the sum of both masks for keys with the added ones, broadcastable to ``(B, heads, T, source)``."""

        def additive(mask: Tensor) -> Tensor:
            if not mask.is_floating_point():
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask.bool(), -math.inf)
            return F.pad(mask.to(query.dtype), (0, source - mask.shape[-1]))

        total: Tensor | None = None
        if attn_mask is not None:
            total = additive(attn_mask)
            if total.dim() == 3:
                total = total.reshape(total.shape[0] // self.num_heads, self.num_heads, *total.shape[1:])
        if key_padding_mask is not None:
            padding = additive(key_padding_mask)[:, None, None]
            total = padding if total is None else total + padding
        return total
