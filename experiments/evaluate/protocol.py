"""The frozen protocol: what numbers must share to be compared, in a file beside them, its hash with each of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from experiments.config import EvaluationConfig, FrozenModel
from experiments.core.files import parse_json_object, write_json
from experiments.core.registries import METRICS
from experiments.distill.context import DistillationContext
from experiments.metrics.inputs.compared_images import compared_images
from experiments.metrics.inputs.feature_networks import open_network
from experiments.metrics.inputs.true_images import open_true_images
from mixers.user_source import is_library_class, source_digest

FILE = "protocol.json"


class Protocol(FrozenModel):
    """Everything that decides an evaluation's numbers, except the student and the machine.

    Attributes:
        prompts, prompts_sha256: of the samples.
        seeds: of each prompt's noise.
        sampler: the scheduler's class and settings, steps, guidance scales.
        resize: what happens to images before a feature network.
        image_format: what the networks receive.
        data: names of the data sets that are compared, and SHA-256s of the images and captions.
        features: SHA-256s of the weights of feature networks.
        metric_sources: SHA-256s of the source of metrics that are a user's own.
        teacher: SHA-256 of all its weights and settings.
        evaluation: everything else in the evaluation's configuration.
    """

    version: int = 2
    prompts: tuple[str, ...]
    prompts_sha256: str
    seeds: tuple[int, ...]
    sampler: dict[str, Any]
    resize: str
    image_format: str = "uint8 RGB; samples as PNG"
    data: dict[str, str]
    features: dict[str, str]
    metric_sources: dict[str, str]
    teacher: str
    evaluation: dict[str, Any]

    @property
    def hash(self) -> str:
        """SHA-256 of all of it."""
        return _sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True))


def protocol_of(context: DistillationContext, plan: EvaluationConfig, data: str) -> Protocol:
    """Return the protocol of an evaluation; nothing may be mounted in the UNet.

    Costs about a second per GB of weights, once for each state of the weights, and reads every image that is compared.

    Raises:
        ValueError: there are too few images for a held-out split, or the true images or a feature network are not
            available.
    """
    scheduler = context.pipe.scheduler
    settings = {key: value for key, value in scheduler.config.items() if key[0] != "_"}
    generated = plan.generated
    return Protocol(
        prompts=plan.prompts,
        prompts_sha256=_sha256("\n".join(plan.prompts)),
        seeds=tuple(plan.seed + k for k in range(len(plan.prompts))),
        sampler={
            "class": type(scheduler).__name__,
            "steps": plan.sample_steps,
            "guidance": plan.guidance,
            "guidances": list(plan.all_guidances),
            "settings": json.loads(json.dumps(settings, default=str)),
        },
        resize=f"center crop, Lanczos to {generated.resize or 'the generated size'}; then the network's own",
        data=_compared_data(context, plan, data),
        features={name: open_network(name).fingerprint for name in generated.features} if generated.images else {},
        metric_sources=_metric_sources(plan),
        teacher=context.teacher.fingerprint,
        evaluation=plan.model_dump(mode="json", exclude={"prompts", "sample_steps", "guidance", "guidances"}),
    )


def freeze_protocol(protocol: Protocol, directory: Path, measured: Collection[str] | None = None) -> str:
    """Write `directory/protocol.json`, or check that the existing one is the same.

    Args:
        protocol: of the results that are to be added.
        directory: of the results.
        measured: hashes of the protocols of the results that stay in the directory; if all are this protocol's, the
            file may change. None: the file's own.

    Returns:
        The protocol's hash.

    Raises:
        ValueError: the existing protocol is another, or damaged; the message says what differs.
    """
    path = directory / FILE
    new = {**protocol.model_dump(mode="json"), "hash": protocol.hash}
    if not path.is_file() or (measured is not None and set(measured) <= {protocol.hash}):
        write_json(path, new)
        return protocol.hash
    try:
        changes = differences(parse_json_object(path.read_text(encoding="utf-8")), new)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read the protocol {path}: {error}. Give another folder with --out.") from error
    if changes:
        rest = f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
        raise ValueError(
            f"The results in {directory} were measured by another protocol: {'; '.join(changes[:4])}{rest}. Numbers of "
            "two protocols cannot be compared: give another folder with --out, or use the settings of that run."
        )
    return protocol.hash


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List what two protocols' files differ in, one clause each; hashes only if nothing else differs."""
    old_values = _flatten(old)
    new_values = _flatten(new)
    keys = [key for key in {**old_values, **new_values} if old_values.get(key) != new_values.get(key)]
    readable = [key for key in keys if key not in ("hash", "prompts_sha256")] or keys
    return [f"{key} was {_shorten(old_values.get(key))} and is now {_shorten(new_values.get(key))}" for key in readable]


def _metric_sources(plan: EvaluationConfig) -> dict[str, str]:
    classes = {name: METRICS.get(name) for name, _ in plan.metric_options()}
    return {name: source_digest(cls) for name, cls in classes.items() if not is_library_class(cls)}


def _compared_data(context: DistillationContext, plan: EvaluationConfig, data: str) -> dict[str, str]:
    held_out = compared_images(context, data, "held_out", plan)
    compared = {"held_out": held_out.data.name, "held_out_sha256": held_out.digest}
    if plan.held_in_images:
        compared["held_in_sha256"] = compared_images(context, data, "held_in", plan).digest
    if plan.generated.images:
        reference = open_true_images(data, plan)
        compared |= {"generated": reference.data.name, "generated_sha256": reference.digest}
    return compared


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _shorten(value: Any, length: int = 60) -> str:
    text = "missing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 1] + "…"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
