"""Linear layers whose weights are quantized, as the libraries leave them, without the libraries.

What a stand-in does and refuses was compared with the library itself: torchao 0.18 (`torchao/utils.py`,
`quantization/quantize_/workflows/int8/int8_tensor.py`, pytorch/ao at ccb28b4) and quanto 0.2.7
(`optimum/quanto/tensor/qtensor.py`, `nn/qmodule.py`, huggingface/optimum-quanto at e33f820). The test
`test_stand_ins_behave_as_the_libraries` compares them again wherever a library is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

aten = torch.ops.aten


class WrappedTensor(Tensor):
    """A tensor subclass that says it is float32 and holds int8 values and scales; it has no storage of its own."""

    qdata: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor) -> WrappedTensor:
        return Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype, device=qdata.device)

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        self.qdata = qdata
        self.scale = scale

    @classmethod
    def quantize(cls, weight: Tensor) -> WrappedTensor:
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.qdata.to(self.scale.dtype) * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["qdata", "scale"], {}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> WrappedTensor:
        return cls(inner["qdata"], inner["scale"])

    def map(self, function: Callable[[Tensor], Tensor]) -> WrappedTensor:
        return type(self)(function(self.qdata), function(self.scale))


class TorchAOTensor(WrappedTensor):
    """As torchao's Int8Tensor: computes linear layers, copies itself, and refuses every other operation."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.dequantize().to(x.dtype), *bias, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.clone.default, aten.alias.default, aten.contiguous.default):
            return args[0].map(lambda inner: func(inner))
        if func is aten._to_copy.default:
            options = {key: value for key, value in (kwargs or {}).items() if key == "device"}
            return args[0].map(lambda inner: inner.to(**options))
        raise NotImplementedError(f"{cls.__name__} dispatch: attempting to run unimplemented operator/function: {func}")


class QuantoTensor(WrappedTensor):
    """As quanto's WeightQBytesTensor: an operation that it does not know is computed with the dequantized values."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten.alias.default):
            return args[0].map(lambda inner: func(inner))
        if func is aten._to_copy.default and (kwargs or {}).get("dtype") not in (None, args[0].dtype):
            raise ValueError("The dtype of a weights Tensor cannot be changed")
        args, kwargs = pytree.tree_map_only(cls, lambda tensor: tensor.dequantize(), (args, kwargs or {}))
        return func(*args, **kwargs)


class QuantoLinear(nn.Linear):
    """As quanto's frozen QLinear: its state dict has the parts of the weight, which asks for a gradient."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight._data"] = self.weight.qdata  # type: ignore[attr-defined]
        destination[prefix + "weight._scale"] = self.weight.scale  # type: ignore[attr-defined]
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()


class IntegerLinear(nn.Module):
    """As of bitsandbytes: weights stored as integers, with a scale beside them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class PackedLinear(IntegerLinear):
    """As of GPTQ and AWQ: the weight is a buffer of another name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("qweight", self.weight.data)
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def torchao_stand_in(linear: nn.Linear) -> nn.Linear:
    """torchao replaces the weight and keeps the layer."""
    linear.weight = nn.Parameter(TorchAOTensor.quantize(linear.weight), requires_grad=False)
    return linear


def quanto_stand_in(linear: nn.Linear) -> nn.Linear:
    """quanto replaces the layer."""
    layer = QuantoLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    layer.weight = nn.Parameter(QuantoTensor.quantize(linear.weight))
    layer.bias = linear.bias
    return layer


def with_torchao(linear: nn.Linear) -> nn.Linear:
    """Quantize with the library itself."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


def with_quanto(linear: nn.Linear) -> nn.Linear:
    """Quantize with the library itself."""
    from optimum.quanto import freeze, qint8, quantize

    model = nn.Sequential(linear)
    quantize(model, weights=qint8)
    freeze(model)
    return model[0]


STAND_INS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "torchao": torchao_stand_in,
    "quanto": quanto_stand_in,
    "bitsandbytes": IntegerLinear,
    "GPTQ": PackedLinear,
}
LIBRARIES = {"torchao": ("torchao", with_torchao), "quanto": ("optimum.quanto", with_quanto)}
"""Libraries that run on a CPU: the module to import, and how to quantize with it."""
