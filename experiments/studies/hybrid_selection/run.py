"""From candidate mixers to a selection: train, measure, solve, compare, write.

    students -> errors of single sites -> times -> selection -> errors of whole selections -> adapter/, result.json

Every measured number is written to `measurements.json` at once. Started again after a stop, or with another goal, the
run measures what is missing alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.bench.attention_layer import STOCK
from experiments.bench.machine import describe_machine
from experiments.config.base import short_hash
from experiments.core.files import read_json, require_same_inputs, write_json
from experiments.core.locks import lock_folder
from experiments.core.progress import ProgressCallback
from experiments.core.statistics import Interval, bootstrap_interval
from experiments.data import open_records
from experiments.data.example import SPLITS, digest_records
from experiments.distill import DistillationContext, open_context
from experiments.distill.student import training_sources
from experiments.metrics.inputs.compared_images import compared_images
from experiments.studies.hybrid_selection.config import HybridConfig, SelectionGoal, split_images
from experiments.studies.hybrid_selection.measure import SizeTimes, measure_errors, measure_times
from experiments.studies.hybrid_selection.selection import (
    HybridMeasurements,
    HybridSelection,
    pareto_selections,
    rule_selections,
    select_hybrid,
)
from experiments.studies.hybrid_selection.students import combine_students, train_student
from unet_adapters import MixerAdapter
from unet_adapters.hosts import find_host

RUN = "run.json"
MEASUREMENTS = "measurements.json"
RESULT = "result.json"


class HybridRun:
    """A folder of measurements, and what is needed to complete them.

    Args:
        directory: of the run.
        config: of the measurements.
        progress: called as every phase advances.

    Raises:
        ValueError: the directory holds the run of another configuration, teacher, data or source of a mixer; or the
            teacher or its data cannot be used.
    """

    def __init__(self, directory: Path, config: HybridConfig, progress: ProgressCallback) -> None:
        self.directory = directory
        self.config = config
        self.progress = progress
        self.context: DistillationContext = _open_context(config)
        plan = config.evaluation
        images = compared_images(self.context, config.data, "held_out", plan)
        self.selecting_images, self.comparing_images = split_images(len(images), plan.timestep_groups)
        self._check_same_run()
        self._numbers: dict[str, Any] = {"errors": {}, "times": {}, "together": {}}
        self._numbers |= read_json(directory / MEASUREMENTS)
        self._discard_times_of_other_machines()
        self.students: Mapping[str, MixerAdapter] = {
            name: train_student(self.context, config, name, directory, progress) for name in config.mixers
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the images in pixels, increasing."""
        return tuple(sorted(self.config.evaluation.sizes))

    @property
    def machine(self) -> dict[str, Any]:
        """What the times hold for."""
        machine: dict[str, Any] = self._numbers["machine"]
        return machine

    def measure(self) -> HybridMeasurements:
        """Measure every site with every mixer at every size, the error of each and the time of each."""
        sites = tuple(site.name for site in find_host(self.context.pipe).sites())
        errors: dict[str, dict[str, dict[int, list[float]]]] = {
            mixer: {site: {} for site in sites} for mixer in self.config.mixers
        }
        for size in self.sizes:
            for number, mixer in enumerate(self.config.mixers):
                for position, site in enumerate(sites):
                    errors[mixer][site][size] = self._errors("errors", {site: mixer}, size)
                    done = number * len(sites) + position + 1
                    self.progress(f"error of each site, {size} px", done, len(sites) * len(self.config.mixers))
        times = {}
        for number, size in enumerate(self.sizes):
            self.progress("times", number, len(self.sizes))
            times[size] = self._times(size)
        self.progress("times", len(self.sizes), len(self.sizes))
        return HybridMeasurements(sites, errors, times)

    def errors_together(self, selection: HybridSelection) -> dict[int, list[float]]:
        """Return the relative error of the adapter that a selection is, on each image that compares, by size."""
        errors = {}
        for size in self.sizes:
            values = self._errors("together", selection.assignment, size, selection.min_tokens)
            errors[size] = [values[image] for image in self.comparing_images]
        return errors

    def write_adapter(self, selection: HybridSelection) -> Path:
        """Write the adapter of a selection; returns its folder."""
        folder = self.directory / "adapter"
        host = find_host(self.context.pipe)
        combine_students(self.students, selection.assignment, host, selection.min_tokens).save_pretrained(folder)
        return folder

    def _errors(self, kind: str, assignment: Mapping[str, str], size: int, min_tokens: int = 0) -> list[float]:
        key = f"{short_hash(dict(sorted(assignment.items())))} {min_tokens} {size}"
        if key not in self._numbers[kind]:
            adapter = combine_students(self.students, assignment, find_host(self.context.pipe), min_tokens)
            values = measure_errors(self.context, self.config, adapter, size)
            self._numbers[kind][key] = {
                "assignment": dict(assignment),
                "min_tokens": min_tokens,
                "size": size,
                "errors": list(values),
            }
            write_json(self.directory / MEASUREMENTS, self._numbers)
        errors: list[float] = self._numbers[kind][key]["errors"]
        return errors

    def _times(self, size: int) -> SizeTimes:
        if str(size) not in self._numbers["times"]:
            times = measure_times(self.context, self.config, self.students, size)
            self._numbers["times"][str(size)] = times.model_dump(mode="json")
            write_json(self.directory / MEASUREMENTS, self._numbers)
        return SizeTimes(**self._numbers["times"][str(size)])

    def _check_same_run(self) -> None:
        inputs = {
            "configuration": self.config.model_dump(mode="json"),
            "teacher": self.context.teacher.fingerprint,
            "data": [digest_records(open_records(self.config.data, split=split)) for split in SPLITS],
            "plugin source": [training_sources(name, self.config.distillation) for name in self.config.mixers],
        }
        require_same_inputs(self.directory / RUN, inputs, self.directory.rglob("*.safetensors"))
        write_json(self.directory / RUN, inputs)

    def _discard_times_of_other_machines(self) -> None:
        machine = describe_machine(str(self.context.teacher.device))
        if self._numbers.get("machine") != machine:
            self._numbers |= {"machine": machine, "times": {}}


def run_selection(
    directory: Path, config: HybridConfig, goal: SelectionGoal, progress: ProgressCallback
) -> dict[str, Any]:
    """Select sites and mixers for a goal on half of the images, and compare it with rules of thumb on the others.

    Args:
        directory: receives mixers/, measurements.json, adapter/ and result.json.
        config: what is measured; a different one needs another directory.
        goal: may differ from that of an earlier run of the directory.
        progress: called as (phase, done, total).

    Returns:
        The results, as written to result.json.

    Raises:
        ValueError: the directory is in use or holds another run; a mixer, the teacher or its data cannot be used; or
            there is nothing to select.
    """
    with lock_folder(directory, "selection of sites"):
        run = HybridRun(directory, config, progress)
        measurements = run.measure()
        selecting = measurements.of_images(run.selecting_images)
        comparing = measurements.of_images(run.comparing_images)
        measured = select_hybrid(selecting, goal)
        selections = [measured, *rule_selections(selecting, goal, measured, config.random_selections)]
        together = []
        for number, selection in enumerate(selections):
            progress("errors of whole selections", number, len(selections))
            together.append(run.errors_together(selection))
        progress("errors of whole selections", len(selections), len(selections))
        run.write_adapter(measured)
        rows = [
            _describe_selection(comparing, selection, errors, together[0])
            for selection, errors in zip(selections, together, strict=True)
        ]
        result = {
            "goal": str(goal),
            "machine": run.machine,
            "config": config.model_dump(mode="json"),
            "sizes": list(run.sizes),
            "stock_seconds": {str(size): measurements.seconds({}, size) for size in run.sizes},
            "sites": _describe_sites(measurements),
            "selections": rows,
            "front": [
                _describe_front_point(comparing, seconds, assignment)
                for seconds, _, assignment in pareto_selections(selecting)
            ],
        }
        write_json(directory / RESULT, result)
        return result


def _open_context(config: HybridConfig) -> DistillationContext:
    plan = config.distillation
    return open_context(
        config.teacher, config.data, plan.image_size, plan.images, plan.all_sizes[1:], config.teacher_variant
    )


def _describe_sites(measurements: HybridMeasurements) -> list[dict[str, Any]]:
    """One row for each site and mixer: its error with an interval, and its time over softmax attention's, by size."""
    rows = []
    for site in measurements.sites:
        for mixer in measurements.mixers:
            sizes = {}
            for size in measurements.sizes:
                times = measurements.times[size]
                sizes[str(size)] = {
                    "tokens": times.tokens[site],
                    "error": _interval(bootstrap_interval(measurements.errors[mixer][site][size])),
                    "seconds": times.seconds[mixer][site],
                    "stock_seconds": times.seconds[STOCK][site],
                }
            rows.append({"site": site, "mixer": mixer, "sizes": sizes})
    return rows


def _describe_selection(
    measurements: HybridMeasurements,
    selection: HybridSelection,
    errors: Mapping[int, list[float]],
    reference: Mapping[int, list[float]],
) -> dict[str, Any]:
    """One row of the comparison; `excess` is its error minus the reference's, image by image."""
    by_image = _mean_over_sizes(errors)
    differences = [a - b for a, b in zip(by_image, _mean_over_sizes(reference), strict=True)]
    return {
        "name": selection.name,
        "assignment": dict(selection.assignment),
        "softmax_sites": len(measurements.sites) - len(selection.assignment),
        "min_tokens": selection.min_tokens,
        "summed_error": measurements.summed_error(selection.assignment, min_tokens=selection.min_tokens),
        "error": _interval(bootstrap_interval(by_image)),
        "excess": _interval(bootstrap_interval(differences)),
        "sizes": {
            str(size): {
                "summed_error": measurements.summed_error(selection.assignment, size, selection.min_tokens),
                "error": _interval(bootstrap_interval(errors[size])),
                "seconds": measurements.seconds(selection.assignment, size),
            }
            for size in measurements.sizes
        },
    }


def _describe_front_point(
    measurements: HybridMeasurements, seconds: float, assignment: Mapping[str, str]
) -> dict[str, Any]:
    """One point of the Pareto front: selected on other images than those of its error."""
    error = measurements.summed_error(assignment, min_tokens=measurements.min_tokens(assignment))
    return {"seconds": seconds, "summed_error": error, "assignment": dict(assignment)}


def _mean_over_sizes(errors: Mapping[int, list[float]]) -> list[float]:
    return [fmean(values) for values in zip(*errors.values(), strict=True)]


def _interval(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}
