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
from mixers.testing.inputs import Inputs, rebuilt, run
from mixers.testing.tolerances import assert_close


def fits_a_host(mixer: TokenMixer) -> bool:
    """Whether it can be handed projections of the model's width."""
    return mixer.config.scan != "cross" and (mixer.key_width, mixer.value_width) == (mixer.dim, mixer.dim)


def check_projections_are_called(mixer: TokenMixer, inputs: Inputs) -> None:
    """Handed a host's projections, each part of each is called once; nothing of them is kept."""
    x, host = inputs.tokens(mixer, max(inputs.lengths)), mixer.resolve_projections(None)
    calls: Counter[str] = Counter()

    def counted(name: str, module: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        def call(t: Tensor) -> Tensor:
            calls[name] += 1
            return module(t)

        return call

    names = [name for name in ("to_q", "to_k", "to_v") if hasattr(host, name)]
    parts = {name: counted(name, getattr(host, name)) for name in names}
    last = [counted("to_out", host.to_out), counted("dropout", torch.nn.Identity())]
    mounted = rebuilt(mixer, own_projections=False)
    assert_close(run(mounted, x, SimpleNamespace(**parts, to_out=last)), run(mixer, x), what="with a host's")
    assert calls == dict.fromkeys((*names, "to_out", "dropout"), 1), f"calls: {dict(calls)}, expected one each"
    assert not any(name.startswith("projections.") for name in mounted.state_dict()), "has projections of its own"


@torch.no_grad()
def check_mix_gives_a_new_tensor(mixer: TokenMixer, inputs: Inputs) -> None:
    """What `mix` gives is nobody else's, for without gradients it is overwritten: no view of a stream, no `expand`."""
    streams = inputs.streams(mixer, max(inputs.lengths))
    tensors = {name: t for name, t in vars(streams).items() if isinstance(t, Tensor)}
    before = {name: t.clone() for name, t in tensors.items()}
    y = mixer.mix(streams)
    repeated = [axis for axis, (size, stride) in enumerate(zip(y.shape, y.stride(), strict=True)) if size > 1 > stride]
    assert not repeated, f"the result repeats one element along the axes {repeated}: y.contiguous() would do"
    y.zero_()
    changed = [name for name, t in tensors.items() if not torch.equal(t, before[name])]
    assert not changed, f"the result is a view of {', '.join(changed)}: y.clone() would do"


def check_deterministic_copies(mixer: TokenMixer, inputs: Inputs) -> None:
    """The same input gives the same output, also from a deep copy and from a pickle."""
    x = inputs.tokens(mixer, max(inputs.lengths))
    y = run(mixer, x)
    assert torch.equal(run(mixer, x), y) and torch.equal(run(copy.deepcopy(mixer), x), y)
    if "<locals>" not in type(mixer).__qualname__:  # pickle finds no class that is defined in a function
        assert torch.equal(run(pickle.loads(pickle.dumps(mixer)), x), y), "a pickled copy gives another output"


def check_saved_and_loaded(mixer: TokenMixer, inputs: Inputs) -> None:
    """The configuration as JSON and the state without pickled code rebuild the mixer to the last bit."""
    config = type(mixer.config)(**json.loads(json.dumps(mixer.config.to_dict())))
    assert config == mixer.config, "the configuration does not survive JSON"
    buffer = io.BytesIO()
    torch.save(mixer.state_dict(), buffer)
    buffer.seek(0)
    fresh = type(mixer)(config, mixer.dim, mixer.heads).double()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x = inputs.tokens(mixer, max(inputs.lengths))
    assert torch.equal(run(fresh, x), run(mixer, x)), "the rebuilt mixer gives another output"


def check_meta_construction(mixer: TokenMixer, inputs: Inputs) -> None:
    """The mixer can be built on the meta device, for structure without memory."""
    with torch.device("meta"):
        ghost = type(mixer)(mixer.config, mixer.dim, mixer.heads)
    devices = {t.device.type for t in (*ghost.parameters(), *ghost.buffers())}
    assert devices == {"meta"}, f"built on {', '.join(sorted(devices))}"
