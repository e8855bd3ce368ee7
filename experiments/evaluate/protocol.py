"""The frozen protocol: what numbers must share to be compared, in a file beside them, its hash with each of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.config import EvaluationConfig, FrozenModel
from experiments.core.files import write_json
from experiments.distill.context import DistillationContext
from experiments.evaluate.features import open_network, weights_digest
from experiments.evaluate.reference import open_reference

FILE = "protocol.json"


class Protocol(FrozenModel):
    """All that decides an evaluation's numbers but the student and the machine.

    Attributes:
        prompts, prompts_sha256: of the samples.
        seeds: of each prompt's noise.
        sampler: the scheduler's class and settings, steps, guidances.
        resize: what happens to pictures before a network sees them.
        image_format: what the networks see.
        data: names of the pictures that are compared, and SHA-256s of which they are.
        features: SHA-256s of the weights of feature networks.
        teacher: the SHA-256 of all its weights and settings.
        evaluation: everything else that was asked for.
    """

    version: int = 1
    prompts: tuple[str, ...]
    prompts_sha256: str
    seeds: tuple[int, ...]
    sampler: dict[str, Any]
    resize: str
    image_format: str = "uint8 RGB; samples as PNG"
    data: dict[str, str]
    features: dict[str, str]
    teacher: str
    evaluation: dict[str, Any]

    @property
    def hash(self) -> str:
        """The SHA-256 of all of it."""
        return _sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True))


@lru_cache(maxsize=4)
def protocol_of(setting: DistillationContext, plan: EvaluationConfig, data: str) -> Protocol:
    """The protocol of an evaluation; the UNet must be as the teacher has it: nothing mounted.

    Costs about a second per GB of weights, once.

    Raises:
        ValueError: the true pictures or a feature network are not at hand.
    """
    metrics, scheduler, held_out = plan.metrics, setting.pipe.scheduler, setting.held_out
    compared = {"held_out": getattr(held_out, "name", data)}
    if hasattr(held_out, "key"):
        compared["held_out_sha256"] = _sha256("\n".join(held_out.key(i) for i in range(len(held_out))))
    if metrics.images:
        reference = open_reference(data, plan)
        compared |= {"metrics": reference.data.name, "metrics_sha256": reference.digest}
    known = {key: value for key, value in scheduler.config.items() if key[0] != "_"}
    return Protocol(
        prompts=plan.prompts,
        prompts_sha256=_sha256("\n".join(plan.prompts)),
        seeds=tuple(plan.seed + k for k in range(len(plan.prompts))),
        sampler={
            "class": type(scheduler).__name__,
            "steps": plan.sample_steps,
            "guidance": plan.guidance,
            "guidances": list(plan.all_guidances),
            "settings": json.loads(json.dumps(known, default=str)),
        },
        resize=f"center crop, Lanczos to {metrics.resize or 'the size drawn'}; then the network's own",
        data=compared,
        features={name: open_network(name).fingerprint for name in metrics.features} if metrics.images else {},
        teacher=teacher_fingerprint(setting),
        evaluation=plan.model_dump(mode="json", exclude={"prompts", "sample_steps", "guidance", "guidances"}),
    )


def freeze(protocol: Protocol, directory: Path, measured: Collection[str] | None = None) -> str:
    """Write `directory/protocol.json`, or make sure that the one there is the same; returns its hash.

    Args:
        measured: the protocols, as hashes, of the results that stay in the directory; None: the file's own. Where none
            of them is another, the file may change.

    Raises:
        ValueError: it is another, or damaged; the message says what differs.
    """

    path, wanted = directory / FILE, protocol.model_dump(mode="json")
    if not path.is_file() or (measured is not None and set(measured) <= {protocol.hash}):
        write_json(path, {**wanted, "hash": protocol.hash})
        return protocol.hash
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        differing = differences(there, {**wanted, "hash": protocol.hash})
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"Cannot read the protocol {path}: {error}. Give another folder with --out.") from error
    if differing:
        told = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
        raise ValueError(
            f"The results in {directory} were measured by another protocol: {told}. Numbers of two protocols are not "
            "compared: give another folder with --out, or ask for what was asked for then."
        )
    return protocol.hash


def differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """What two protocols' files differ in, as sentences without their stops; hashes only where nothing else tells."""
    old, new = _flat(there), _flat(asked)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    telling = [key for key in keys if key not in ("hash", "prompts_sha256")] or keys
    return [f"{key} was {_short(old.get(key))} and is now {_short(new.get(key))}" for key in telling]


def teacher_fingerprint(setting: DistillationContext) -> str:
    """The SHA-256 of a teacher: its encoders, tokenizers, autoencoder and UNet."""
    return _sha256(f"{setting.teacher.encoder_fingerprint} {weights_digest(setting.teacher.unet)}")


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat


def _short(value: Any, length: int = 60) -> str:
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 1] + "…"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
