"""Promises as a torch module: whose projections it calls, how it is copied, saved and built."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from mixers.mixer import TokenMixer
from mixers.testing.inputs import CheckInputs, rebuild, run_mixer
from mixers.testing.tolerances import assert_close


def fits_a_host(mixer: TokenMixer) -> bool:
    """Return whether it can use projections of the model's width."""
    return mixer.config.scan != "cross" and (mixer.key_width, mixer.value_width) == (mixer.dim, mixer.dim)


def check_projections_are_called(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """The mixer calls each part of every projection of the host once, and keeps none of the projections."""
    x = inputs.tokens(mixer, max(inputs.lengths))
    host = mixer.resolve_projections(None)
    calls: Counter[str] = Counter()

    def count(name: str, module: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        def call(t: Tensor) -> Tensor:
            calls[name] += 1
            return module(t)

        return call

    names = [name for name in ("to_q", "to_k", "to_v") if hasattr(host, name)]
    parts = {name: count(name, getattr(host, name)) for name in names}
    to_out = [count("to_out", host.to_out), count("dropout", torch.nn.Identity())]
    mounted = rebuild(mixer, own_projections=False)
    y = run_mixer(mounted, x, SimpleNamespace(**parts, to_out=to_out))
    assert_close(y, run_mixer(mixer, x), what="output with a host's projections")
    assert calls == dict.fromkeys((*names, "to_out", "dropout"), 1), f"calls: {dict(calls)}, expected one each"
    assert not any(name.startswith("projections.") for name in mounted.state_dict()), "has projections of its own"


@torch.no_grad()
def check_mix_gives_a_new_tensor(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """The result of `mix` is a new tensor without overlapping memory, because inference overwrites it in place."""
    streams = inputs.streams(mixer, max(inputs.lengths))
    tensors = {name: t for name, t in vars(streams).items() if isinstance(t, Tensor)}
    before = {name: t.clone() for name, t in tensors.items()}
    y = mixer.mix(streams)
    repeated = [axis for axis, (size, stride) in enumerate(zip(y.shape, y.stride(), strict=True)) if size > 1 > stride]
    assert not repeated, f"the result repeats one element along the axes {repeated}: return y.contiguous()"
    y.zero_()
    changed = [name for name, t in tensors.items() if not torch.equal(t, before[name])]
    assert not changed, f"the result is a view of {', '.join(changed)}: return y.clone()"


def check_repeatable(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """The same input gives the same output."""
    x = inputs.tokens(mixer, max(inputs.lengths))
    assert torch.equal(run_mixer(mixer, x), run_mixer(mixer, x)), "two calls on the same tokens differ"


def check_pickled_copies(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """A deep copy, a pickled copy and a copy through torch.save give the same output, bit for bit."""
    x = inputs.tokens(mixer, max(inputs.lengths))
    y = run_mixer(mixer, x)
    buffer = io.BytesIO()
    torch.save(mixer, buffer)
    buffer.seek(0)
    copies = {
        "copy.deepcopy": copy.deepcopy(mixer),
        "pickle": pickle.loads(pickle.dumps(mixer)),
        "torch.save": torch.load(buffer, weights_only=False),
    }
    for way, duplicate in copies.items():
        assert torch.equal(run_mixer(duplicate, x), y), f"a copy by {way} gives another output"


def check_saved_and_loaded(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """The configuration as JSON and the state dict, without pickled code, rebuild the mixer bit for bit."""
    config = type(mixer.config)(**json.loads(json.dumps(mixer.config.to_dict())))
    assert config == mixer.config, "the configuration changes on its way through JSON"
    buffer = io.BytesIO()
    torch.save(mixer.state_dict(), buffer)
    buffer.seek(0)
    fresh = type(mixer)(config, mixer.dim, mixer.heads).double()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x = inputs.tokens(mixer, max(inputs.lengths))
    assert torch.equal(run_mixer(fresh, x), run_mixer(mixer, x)), "the rebuilt mixer gives another output"


def check_meta_construction(mixer: TokenMixer, inputs: CheckInputs) -> None:
    """The mixer can be built on the meta device, which shows its structure without allocating memory."""
    with torch.device("meta"):
        on_meta = type(mixer)(mixer.config, mixer.dim, mixer.heads)
    devices = {t.device.type for t in (*on_meta.parameters(), *on_meta.buffers())}
    assert devices == {"meta"}, f"built on {', '.join(sorted(devices))}"
