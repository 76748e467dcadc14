"""What makes models run faster on a CPU: nothing here changes what they mean, and on a GPU it all steps aside.

Measured, not guessed: ``benchmarks/speed``. What did not pay is in LOG.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from shoulders.hub import quiet

ATTENTION = "shoulders"  # the name of :func:`attention` in transformers' table
FEW = 640  # places: in bf16 two matrix products take half the time of the fused kernel at 200, the same at 1,000


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **how: Any
) -> tuple[Tensor, None]:
    """Attention of query, key and value (B, heads, N, C / heads), as (B, N, heads, C / heads).

    In bf16 on a CPU, where torch's fused kernel is the slower one, two matrix products and a softmax; else the kernel.
    """
    if not _two_products(module, query, key, attention_mask, how):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    batch, heads = query.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # (B * heads, N, C / heads)
    scale = how.get("scaling") or query.shape[-1] ** -0.5
    weights = torch.baddbmm(q.new_zeros(1), q, k.mT, beta=0, alpha=scale).softmax(-1)  # (B * heads, N, N)
    return torch.bmm(weights, v).unflatten(0, (batch, heads)).transpose(1, 2).contiguous(), None


def _two_products(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, how: dict[str, Any]) -> bool:
    causal = how.get("is_causal")
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and key.shape[2] <= FEW
        and key.shape[1] == query.shape[1]
        and mask is None
        and how.get("position_bias") is None
        and not how.get("dropout")
        and not (getattr(module, "is_causal", True) if causal is None else causal)
        and not torch.compiler.is_compiling()  # it would turn them back into the kernel
    )


def quicken(model: nn.Module) -> None:
    """Make a frozen transformers model ready to be asked: it attends by :func:`attention`, its layers are packed."""
    _attend(model)
    _pack(model)


def _attend(model: nn.Module) -> None:
    """One with attention of its own stays as it is."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    with quiet():
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]


class Packed(nn.Linear):
    """A frozen linear layer with its weight a second time, in bf16 and in the order in which the CPU multiplies.

    Used where no gradient is wanted; the same bits as without, a tenth sooner. Costs half the weight's memory.
    """

    packed: tuple[Any, Tensor, Tensor | None] | None = None  # what it was made of, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., K)."""
        if torch.is_grad_enabled() or not _in_bf16_on_cpu(x):
            return super().forward(x)
        origin = (self.weight.data_ptr(), self.weight._version)
        if self.packed is None or self.packed[0] != origin:
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().to(torch.bfloat16), None)
            self.packed = origin, weight, None if self.bias is None else self.bias.detach().to(torch.bfloat16)
        _, weight, bias = self.packed
        return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), weight, bias, "none", [], "none")

    def __getstate__(self) -> dict[str, Any]:
        """Without what was packed, which cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "packed"}


def _pack(model: nn.Module) -> None:
    """Make every linear layer :class:`Packed`, where this torch knows how: weights and their names stay as they are."""
    known = torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, op) for op in ("_reorder_linear_weight", "_linear_pointwise")
    )
    for layer in model.modules():
        if known and type(layer) is nn.Linear:
            layer.__class__ = Packed


def arranged(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, h, w), channels last in memory where convolutions are faster that way: in bf16 on a CPU, twice."""
    return pixels.contiguous(memory_format=torch.channels_last) if _in_bf16_on_cpu(pixels) else pixels


def _in_bf16_on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
    )
