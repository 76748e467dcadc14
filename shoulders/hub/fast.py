"""What makes models run faster on a CPU: nothing here changes what they mean, and on a GPU it all steps aside.

Measured, not guessed: ``benchmarks/speed``. What did not pay is in LOG.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from shoulders.hub import quiet

PACKS = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, op) for op in ("_reorder_linear_weight", "_linear_pointwise")
)
EIGHT = all(hasattr(torch.ops.onednn, op) for op in ("qlinear_prepack", "qlinear_pointwise"))
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


def optimize_for_inference(model: nn.Module) -> None:
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


class PackedLinear(nn.Linear):
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
    """Make every linear layer :class:`PackedLinear`, where this torch knows how: weights and their names stay as they are."""
    for layer in model.modules():
        if PACKS and type(layer) is nn.Linear:
            layer.__class__ = PackedLinear


def unpack(model: nn.Module) -> None:
    """Undo the packing of :func:`optimize_for_inference`, of no use to weights that come and go: they would be packed every time."""
    for layer in model.modules():
        if type(layer) is PackedLinear:
            layer.__dict__.pop("packed", None)  # half as large as the weights
            layer.__class__ = nn.Linear  # type: ignore[assignment]


class Int8Linear(nn.Module):
    """A frozen linear layer in int8: a scale for each row of the weight, and one scale for all that comes in.

    Made for CPUs with int8 products of four (VNNI), where it takes half the time of bf16. Not the same bits:
    `shoulders.training.int8_check` says how far off.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    zeros: Tensor

    def __init__(self, layer: nn.Linear):
        super().__init__()
        scale = layer.weight.detach().abs().amax(1).clamp_min(1e-12) / 127  # (K,)
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (layer.weight.detach() / scale[:, None]).round().to(torch.int8))  # (K, C)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.register_buffer("zeros", torch.zeros(len(scale), dtype=torch.int32), persistent=False)
        self.packed = torch.ops.onednn.qlinear_prepack(self.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., K), in the dtype of autocast where that is on."""
        least, most = (float(end) for end in torch.aminmax(x))
        least, most = min(least, 0.0), max(most, 0.0)
        step = max(most - least, 1e-12) / 255
        zero = round(-least / step)
        whole = x.flatten(0, -2).float().mul(1 / step).add_(zero + 0.5).to(torch.uint8)  # cut off, hence the half
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        answer = torch.ops.onednn.qlinear_pointwise(
            whole, step, zero, self.packed, self.scale, self.zeros, self.bias, 1.0, 0, dtype, "none", [], ""
        )
        return answer.unflatten(0, x.shape[:-1])


def int8_available() -> bool:
    """Whether this machine computes faster in int8: a CPU with VNNI, a torch that uses it, and no GPU."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    can = ask() if ask else {}
    return EIGHT and not torch.cuda.is_available() and bool(can.get("avx512_vnni") or can.get("amx_int8"))


def to_int8(model: nn.Module) -> None:
    """Replace every linear layer by its :class:`Int8Linear`."""
    for part in list(model.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear) and type(layer) in (
                nn.Linear,
                PackedLinear,
            ):  # not what other modules derive
                setattr(part, name, Int8Linear(layer))


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


def _flop(x: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Of a linear layer: torch's counter knows neither of the two products."""
    return 2 * math.prod(x) * out_shape[-1]


register_flop_formula([torch.ops.mkldnn._linear_pointwise] if PACKS else [])(_flop)
register_flop_formula([torch.ops.onednn.qlinear_pointwise] if EIGHT else [])(_flop)
