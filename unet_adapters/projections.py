"""The q, k, v and output projections of a site: copies to train, exchanged with the teacher's while mounted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from unet_adapters.sites import Site


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer itself, or the one that a LoRA wraps."""
    unwrap = getattr(layer, "get_base_layer", None)
    return layer if unwrap is None else unwrap()


def copy_projections(
    attn: nn.Module, site: Site, names: Sequence[str], saved: Mapping[str, Tensor] | None = None
) -> dict[str, nn.Module]:
    """Trainable Parameters for a site's projections, by projection name: copies of the layer's own.

    Args:
        attn: the attention layer.
        site: the site.
        names: of the projections.
        saved: weights of a student by their full names. A projection that cannot be copied starts from these.

    Raises:
        ValueError: a projection has no weight in plain floating-point storage (it is quantized), and none is saved.
    """
    return {name: _trainable_copy(attn.get_submodule(name), f"{site.name}.{name}", saved or {}) for name in names}


def _trainable_copy(layer: nn.Module, name: str, saved: Mapping[str, Tensor]) -> nn.Module:
    base = base_layer(layer)
    reason = why_not_trainable(base)
    if reason is None:
        tensors: dict[str, Tensor] = dict(base.named_parameters(recurse=False))
    elif f"{name}.weight" in saved:
        tensors = {key: saved[f"{name}.{key}"] for key in ("weight", "bias") if f"{name}.{key}" in saved}
    else:
        raise ValueError(f"{name}: {reason}, so it cannot be trained: build with train_projections=False")
    holder = nn.Module()
    for key, tensor in tensors.items():
        holder.register_parameter(key, nn.Parameter(tensor.detach().clone()))
    return holder


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


TeacherProjection = Mapping[str, nn.Parameter] | nn.Module
"""What `swap_in` took out: the Parameters of a layer or, if it is quantized, the layer."""


def swap_in(attn: nn.Module, name: str, holder: nn.Module) -> TeacherProjection:
    """Let a projection compute with the holder's Parameter objects; returns what was there, for `swap_out`.

    A LoRA around the projection stays. A quantized layer cannot compute with plain Parameters: a `nn.Linear` takes its
    place.
    """
    base = base_layer(attn.get_submodule(name))
    parameters = dict(holder.named_parameters(recurse=False))
    if why_not_trainable(base) is None:
        originals = dict(base.named_parameters(recurse=False))
        base._parameters.update(parameters)
        return originals
    width_out, width_in = parameters["weight"].shape
    linear = nn.Linear(width_in, width_out, bias="bias" in parameters, device="meta").train(base.training)
    linear._parameters.update(parameters)
    _replace_base(attn, name, linear)
    return base


def swap_out(attn: nn.Module, name: str, holder: nn.Module, original: TeacherProjection) -> None:
    """Put back what `swap_in` returned, moved to where the layer is now.

    A Parameter object that replaced the student's while it was mounted (by a conversion, say) becomes the student's.
    """
    base = base_layer(attn.get_submodule(name))
    for key in holder._parameters:
        holder._parameters[key] = base._parameters[key]
    if isinstance(original, nn.Module):
        _replace_base(attn, name, original)
        return
    for key, parameter in original.items():
        current = base._parameters[key]
        assert current is not None
        _follow(parameter, current)
        base._parameters[key] = parameter


def _replace_base(attn: nn.Module, name: str, layer: nn.Module) -> None:
    parent_name, _, key = name.rpartition(".")
    parent = attn.get_submodule(parent_name)
    while "base_layer" in parent._modules[key]._modules:  # type: ignore[union-attr]
        parent, key = parent._modules[key], "base_layer"  # type: ignore[assignment]
    parent._modules[key] = layer


def teacher_view(attn: nn.Module, teacher: Mapping[str, TeacherProjection], x: Tensor) -> nn.Module:
    """The layer with the teacher's projections, as a view: nothing of the layer itself changes.

    The view shares all modules with `attn` except the projections. A LoRA on them acts on the teacher's weights, also
    one that is fused into the student's. Threads may make views of one layer at the same time.

    Args:
        attn: a mounted layer.
        teacher: projection name -> what `swap_in` took out.
        x: the tokens to be mixed; they say on which device the weights are needed.
    """
    view = _shallow_copy(attn)
    for name, original in teacher.items():
        *parents, last = name.split(".")
        parent = view
        for step in parents:
            child = _shallow_copy(parent.get_submodule(step))
            parent._modules[step] = child
            parent = child
        parent._modules[last] = _teacher_layer(parent.get_submodule(last), original, x)
    return view


def _teacher_layer(layer: nn.Module, original: TeacherProjection, x: Tensor) -> nn.Module:
    if "base_layer" not in layer._modules:
        return original if isinstance(original, nn.Module) else _with_parameters(layer, original, x)
    view = _shallow_copy(layer)
    view._modules["base_layer"] = _teacher_layer(layer.get_submodule("base_layer"), original, x)
    merged = list(getattr(layer, "merged_adapters", ()))
    if merged:  # fused into the student's weights: the view computes the same sum with the teacher's
        vars(view).update(merged_adapters=[], _active_adapter=merged)
    return view


def _with_parameters(layer: nn.Module, parameters: Mapping[str, nn.Parameter], x: Tensor) -> nn.Module:
    view = _shallow_copy(layer)
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
