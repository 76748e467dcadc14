"""Faster inference on a CPU with the same results; on a GPU nothing here applies.

`benchmarks/speed` measures each of these; LOG.md lists what brought nothing.
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

HAS_PACKED_LINEAR = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, op) for op in ("_reorder_linear_weight", "_linear_pointwise")
)
HAS_INT8_LINEAR = all(hasattr(torch.ops.onednn, op) for op in ("qlinear_prepack", "qlinear_pointwise"))
ATTENTION_NAME = "shoulders"  # the name of `attention` in transformers' table
# in bf16 two matrix products take half the time of the fused kernel at 200 tokens, the same at 1,000
MAX_PRODUCT_TOKENS = 640


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as (B, N, heads, C / heads), with the signature of transformers' attention functions.

    In bf16 on a CPU, where torch's fused kernel is slower, it is two matrix products and a softmax; else the kernel.

    Args:
        module: the attention layer.
        query, key, value: (B, heads, N, C / heads).
        attention_mask: added to the scores before the softmax.
        options: of transformers' `sdpa_attention_forward`, such as ``scaling`` and ``dropout``.
    """
    if not _use_two_products(module, query, key, attention_mask, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    batch, heads = query.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))  # (B * heads, N, C / heads)
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    weights = torch.baddbmm(q.new_zeros(1), q, k.mT, beta=0, alpha=scale).softmax(-1)  # (B * heads, N, N)
    return torch.bmm(weights, v).unflatten(0, (batch, heads)).transpose(1, 2).contiguous(), None


def _use_two_products(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> bool:
    causal = options.get("is_causal")
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and key.shape[2] <= MAX_PRODUCT_TOKENS
        and key.shape[1] == query.shape[1]
        and mask is None
        and options.get("position_bias") is None
        and not options.get("dropout")
        and not (getattr(module, "is_causal", True) if causal is None else causal)
        and not torch.compiler.is_compiling()  # the compiler would turn the products back into the kernel
    )


def optimize_for_inference(model: nn.Module) -> None:
    """Prepare a frozen transformers model for inference on a CPU: `attention`, and packed linear layers."""
    _use_attention(model)
    _pack(model)


def _use_attention(model: nn.Module) -> None:
    """Make a model use `attention`, unless it has an attention of its own."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return
    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    with quiet():
        model.set_attn_implementation(ATTENTION_NAME)  # type: ignore[operator]


class PackedLinear(nn.Linear):
    """A frozen linear layer with a second copy of its weight, in bf16 and in the order in which the CPU multiplies.

    Used in bf16 without gradients; gives the same bits in nine tenths of the time, for half the weight's memory.
    """

    packed: tuple[Any, Tensor, Tensor | None] | None = None  # (identity of the weight, packed weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., K)."""
        if torch.is_grad_enabled() or not _is_bf16_on_cpu(x):
            return super().forward(x)
        identity = (self.weight.data_ptr(), self.weight._version)
        if self.packed is None or self.packed[0] != identity:
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach().to(torch.bfloat16), None)
            self.packed = identity, weight, None if self.bias is None else self.bias.detach().to(torch.bfloat16)
        _, weight, bias = self.packed
        return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), weight, bias, "none", [], "none")

    def __getstate__(self) -> dict[str, Any]:
        """The state without the packed copy, which cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "packed"}


def _pack(model: nn.Module) -> None:
    """Turn every linear layer into a `PackedLinear` where this torch has the operators; weights and names stay."""
    for layer in model.modules():
        if HAS_PACKED_LINEAR and type(layer) is nn.Linear:
            layer.__class__ = PackedLinear  # in place: the parameters stay the same objects


def unpack(model: nn.Module) -> None:
    """Undo the packing of `optimize_for_inference`, for weights that are replaced at every step and packed anew."""
    for layer in model.modules():
        if type(layer) is PackedLinear:
            layer.__dict__.pop("packed", None)  # frees half the memory of the weights
            layer.__class__ = nn.Linear  # type: ignore[assignment]


class Int8Linear(nn.Module):
    """A frozen linear layer in int8: one scale for each row of the weight, one scale for all inputs.

    For CPUs with int8 dot products (VNNI), where it takes half the time of bf16. Its results differ;
    `shoulders.training.int8_check` measures by how much.
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
        smallest, largest = (float(end) for end in torch.aminmax(x))
        smallest, largest = min(smallest, 0.0), max(largest, 0.0)
        step = max(largest - smallest, 1e-12) / 255
        zero = round(-smallest / step)
        # the cast to uint8 truncates: adding one half rounds
        quantized = x.flatten(0, -2).float().mul(1 / step).add_(zero + 0.5).to(torch.uint8)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        output = torch.ops.onednn.qlinear_pointwise(
            quantized, step, zero, self.packed, self.scale, self.zeros, self.bias, 1.0, 0, dtype, "none", [], ""
        )
        return output.unflatten(0, x.shape[:-1])


def int8_available() -> bool:
    """Whether this machine computes faster in int8: a CPU with VNNI, a torch that uses it, and no GPU."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    capabilities = get_capabilities() if get_capabilities else {}
    has_vnni = bool(capabilities.get("avx512_vnni") or capabilities.get("amx_int8"))
    return HAS_INT8_LINEAR and not torch.cuda.is_available() and has_vnni


def to_int8(model: nn.Module) -> None:
    """Replace every linear layer by its `Int8Linear`, but no layer of a class derived from `nn.Linear` elsewhere."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and type(layer) in (nn.Linear, PackedLinear):
                setattr(module, name, Int8Linear(layer))


def to_fast_layout(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, h, w) in the memory layout in which convolutions run faster: channels last in bf16 on a CPU."""
    return pixels.contiguous(memory_format=torch.channels_last) if _is_bf16_on_cpu(pixels) else pixels


def _is_bf16_on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.compiler.is_compiling()
    )


def _count_linear_flop(x: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """FLOP of a linear layer, for the two operators that torch's counter does not know."""
    return 2 * math.prod(x) * out_shape[-1]


register_flop_formula([torch.ops.mkldnn._linear_pointwise] if HAS_PACKED_LINEAR else [])(_count_linear_flop)
register_flop_formula([torch.ops.onednn.qlinear_pointwise] if HAS_INT8_LINEAR else [])(_count_linear_flop)
