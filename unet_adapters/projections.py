"""The q, k, v and output projections of a site: copies to train, exchanged with the teacher's while mounted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from unet_adapters.sites import Site


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer itself, or the one that a LoRA wraps."""
    unwrap = getattr(layer, "get_base_layer", None)
    return layer if unwrap is None else unwrap()


def copy_projections(attn: nn.Module, site: Site, names: Sequence[str]) -> dict[str, nn.Module]:
    """Trainable copies of the Parameters of a site's projections, by projection name.

    Raises:
        ValueError: a projection has no weight in plain floating-point storage (it is quantized).
    """
    copies = {}
    for name in names:
        layer = base_layer(attn.get_submodule(name))
        reason = why_not_trainable(layer)
        if reason is not None:
            raise ValueError(
                f"{site.name}.{name}: {reason}, so it cannot be trained: build with train_projections=False"
            )
        holder = nn.Module()
        for key, parameter in layer.named_parameters(recurse=False):
            holder.register_parameter(key, nn.Parameter(parameter.detach().clone()))
        copies[name] = holder
    return copies


def why_not_trainable(layer: nn.Module) -> str | None:
    """Why a projection cannot be copied and trained; None if it can.

    Quantization libraries either store integers or subclass the tensor (bitsandbytes, torchao, quanto, GGUF), or keep
    the weight in buffers of another name (GPTQ, AWQ).
    """
    parameters = dict(layer.named_parameters(recurse=False))
    if "weight" not in parameters:
        return f"{type(layer).__name__} has no parameter called weight"
    for key, parameter in parameters.items():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            return f"{key} is stored as {type(parameter).__name__}, not as a plain tensor"
        if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
            return f"{key} is stored as {parameter.dtype}"
    return None


def swap_in(layer: nn.Module, holder: nn.Module) -> dict[str, nn.Parameter]:
    """Put the holder's Parameter objects on `layer`; returns the layer's own, for `swap_out`."""
    base = base_layer(layer)
    originals = dict(base.named_parameters(recurse=False))
    for key, parameter in holder.named_parameters(recurse=False):
        base._parameters[key] = parameter
    return originals


def swap_out(layer: nn.Module, holder: nn.Module, originals: Mapping[str, nn.Parameter]) -> None:
    """Put the original Parameter objects back, moved to where the layer is now.

    A Parameter object that replaced the student's while it was mounted (by a conversion, say) becomes the student's.
    """
    base = base_layer(layer)
    for key, original in originals.items():
        current = base._parameters[key]
        assert current is not None
        holder._parameters[key] = current
        _follow(original, current)
        base._parameters[key] = original


def teacher_view(attn: nn.Module, teacher: Mapping[str, Mapping[str, nn.Parameter]], x: Tensor) -> nn.Module:
    """The layer with the teacher's projections, as a view: nothing of the layer itself changes.

    The view shares all modules with `attn` except the projections. A LoRA on them acts on the teacher's weights, also
    one that is fused into the student's. Threads may make views of one layer at the same time.

    Args:
        attn: a mounted layer.
        teacher: projection name -> the teacher's Parameters of it.
        x: the tokens to be mixed; they say on which device the weights are needed.
    """
    view = _shallow_copy(attn)
    for name, parameters in teacher.items():
        *parents, last = name.split(".")
        parent = view
        for step in parents:
            child = _shallow_copy(parent.get_submodule(step))
            parent._modules[step] = child
            parent = child
        parent._modules[last] = _with_parameters(parent.get_submodule(last), parameters, x)
    return view


def _with_parameters(layer: nn.Module, parameters: Mapping[str, nn.Parameter], x: Tensor) -> nn.Module:
    view = _shallow_copy(layer)
    if "base_layer" in view._modules:
        view._modules["base_layer"] = _with_parameters(layer.get_submodule("base_layer"), parameters, x)
        merged = list(getattr(layer, "merged_adapters", ()))
        if merged:  # fused into the student's weights: the view computes the same sum with the teacher's
            vars(view).update(merged_adapters=[], _active_adapter=merged)
        return view
    # Hooks for offloading and casting replace `forward` by a function of the student's own layer.
    for key in ("forward", "_hf_hook", "_old_forward", "_diffusers_hook"):
        vars(view).pop(key, None)
    for key, original in parameters.items():
        current = layer._parameters[key]
        if current is not None and current.device == x.device and current.dtype.itemsize > 1:
            _follow(original, current)
            view._parameters[key] = original
        else:
            dtype = x.dtype if current is None or current.dtype.itemsize == 1 else current.dtype
            view._parameters[key] = original.to(x.device, dtype)  # type: ignore[assignment]
    return view


def _shallow_copy(module: nn.Module) -> nn.Module:
    copy = module.__new__(type(module))
    vars(copy).update(vars(module))
    vars(copy).update(_modules=dict(module._modules), _parameters=dict(module._parameters))
    return copy


def _follow(original: nn.Parameter, current: Tensor) -> None:
    if (current.device, current.dtype) != (original.device, original.dtype):
        original.data = original.data.to(current.device, current.dtype)
