"""A grid from configuration to results on a tiny teacher: cells, resuming, failing, the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from experiments.ablation import list_grids, load_grid
from experiments.ablation.cell import open_cell_context, training_key
from experiments.ablation.result import CellResult, read_result
from experiments.ablation.run import run_grid
from experiments.cli import app
from experiments.config import Grid, apply_overrides
from experiments.evaluate import samples as samples_module
from experiments.evaluate.protocol import protocol_of
from experiments.metrics.cost import CostRow
from experiments.metrics.fidelity import FidelityRow
from experiments.teacher import teacher as teacher_module
from experiments.teacher.load import open_teacher
from mixers import entries, list_mixers
from mixers.registry import register_mixer
from mixers.zoo.linear_attention import LinearAttention


def ignore(*_: object) -> None:
    """No progress display."""


def read_results(directory: Path) -> dict[str, CellResult]:
    results = [read_result(path.parent) for path in directory.glob("cells/*/result.json")]
    return {result.variant: result for result in results if result is not None}


def fidelity(result: CellResult, split: str = "held_out") -> list[FidelityRow]:
    assert result.measurements is not None
    return [row for row in result.measurements.rows("fidelity", FidelityRow) if row.split == split]


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_grid_runs_from_configuration_to_results(grid: Grid, tmp_path: Path) -> None:
    run_grid(grid, tmp_path, ignore)
    results = read_results(tmp_path)
    assert set(results) == {"softmax", "linear", "linear_raw"}
    for name, result in results.items():
        assert result.status == "done", result.error
        assert result.measurements is not None
        assert [row.size for row in fidelity(result)] == [64, 128]
        assert [row.size for row in fidelity(result, "held_in")] == [64]
        assert [row.tokens for row in result.measurements.rows("cost", CostRow)] == [256, 1024]
        cell = tmp_path / "cells" / result.cell
        assert (cell / "samples" / "64" / "0.png").is_file()
        matrix = load_file(cell / "arrays.safetensors")["mixing_matrix"]
        assert matrix.shape == (256, 256)
        errors = [row.error_to_teacher for row in fidelity(result)]
        if name == "softmax":
            assert errors == [0.0, 0.0], "the sanity row"
        else:
            assert min(errors) > 0
    assert (tmp_path / "teacher" / "samples" / "64" / "0.png").is_file()
    assert run_grid(grid, tmp_path, ignore) == [], "nothing is done twice"


def test_a_resumed_run_is_bit_identical(grid: Grid, tmp_path: Path) -> None:
    only = grid.model_copy(update={"variants": grid.variants[1:2]})
    run_grid(only, tmp_path / "whole", ignore)

    def kill(_cells: int, _total: int, _label: str, phase: str, done: int, _steps: int) -> None:
        if phase == "distill" and done == 5:
            raise Killed

    with pytest.raises(Killed):
        run_grid(only, tmp_path / "killed", kill)
    assert not read_results(tmp_path / "killed")
    run_grid(only, tmp_path / "killed", ignore)
    cell = only.cells()[0].id
    whole, resumed = (
        load_file(tmp_path / run / "cells" / cell / "adapter" / "adapter.safetensors") for run in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    assert all(whole[k].equal(resumed[k]) for k in whole)


def test_a_failing_cell_is_recorded_and_the_others_run(grid: Grid, tmp_path: Path) -> None:
    broken = grid.variants[1].model_copy(update={"name": "broken", "options": {"no_such_option": 1}})
    results = run_grid(grid.model_copy(update={"variants": (broken, grid.variants[0])}), tmp_path, ignore)
    assert [result.status for result in results] == ["failed", "done"]
    assert "no_such_option" in str(results[0].error)


def test_cell_ids_follow_the_configuration(grid: Grid) -> None:
    ids = [cell.id for cell in grid.cells()]
    assert len(set(ids)) == 3
    assert ids == [cell.id for cell in grid.cells()]
    changed = apply_overrides(grid, ["distillation.fit.steps=7", "seeds=[0,1]"])
    assert len(changed.cells()) == 6
    assert not set(ids) & {cell.id for cell in changed.cells()}
    renamed = apply_overrides(grid, ["variants.1.label=other"])
    assert ids == [cell.id for cell in renamed.cells()], "finished cells are kept where only a label changes"


@pytest.mark.parametrize("setting", ["nonsense", "nothing.there=1", "distillation.fit.steps=-1", "seeds=[]"])
def test_invalid_settings_are_refused(grid: Grid, setting: str) -> None:
    with pytest.raises(ValueError):
        apply_overrides(grid, [setting])


@pytest.mark.parametrize("name", list_grids())
def test_ready_made_grids_load_and_name_registered_mixers(name: str) -> None:
    grid = load_grid(name)
    assert {v.mixer for v in grid.variants} <= set(list_mixers())


def test_grids_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'demo'"):
        load_grid("demoo")
    (tmp_path / "empty.py").write_text("GRID = 3\n")
    with pytest.raises(ValueError, match="does not expose"):
        load_grid(str(tmp_path / "empty.py"))


def test_command_line(grid: Grid, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert "linfusion" in run(app, ["list"]).output
    file = tmp_path / "mine.py"
    file.write_text(f"from experiments.config import Grid\nGRID = Grid.model_validate({grid.model_dump()!r})\n")
    done = run(app, ["ablate", str(file), "--out", str(tmp_path / "run"), "--set", "distillation.fit.steps=2"])
    assert done.exit_code == 0, done.output
    assert "cells: 3/3" in done.output, "a log has lines of progress"
    page = tmp_path / "run" / "report" / "index.html"
    assert page.is_file()
    page.unlink()
    assert run(app, ["report", str(tmp_path / "run")]).exit_code == 0
    assert page.is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["ablate", "nothing"],
        ["report", "no/such/run"],
        ["status", "no/such/run"],
        ["ablate", "demo", "--set", "x"],
        ["ablate", "demo", "--teacher", "no/model"],
    ],
)
def test_invalid_input_is_one_sentence_on_stderr(arguments: list[str], tmp_path: Path) -> None:
    outcome = CliRunner().invoke(
        app, [*arguments, *(["--out", str(tmp_path / "out")] if arguments[0] == "ablate" else [])]
    )
    assert outcome.exit_code == 2
    assert "error" in outcome.stderr and "error" not in outcome.stdout
    assert "Traceback" not in outcome.output


def test_a_trained_student_is_evaluated_again_without_training(grid: Grid, tmp_path: Path) -> None:
    only = grid.model_copy(update={"variants": grid.variants[1:2]})
    first = run_grid(only, tmp_path, ignore)[0]
    phases: list[str] = []
    again = apply_overrides(only, ["evaluation.sizes=[64]"])
    second = run_grid(again, tmp_path, lambda *event: phases.append(event[3]))[0]
    assert "sample" in phases and "distill" not in phases
    assert second.cell != first.cell
    for same in ("steps", "trained_parameters", "train_seconds"):
        assert getattr(second, same) == getattr(first, same) > 0
    assert fidelity(second)[0].error_to_teacher == fidelity(first)[0].error_to_teacher
    logs = [(tmp_path / "cells" / result.cell / "metrics.jsonl").read_text() for result in (first, second)]
    assert logs[0] == logs[1] != ""
    for name in ("trained.json", "adapter/adapter.json", "adapter/adapter.safetensors"):
        contents = {(tmp_path / "cells" / result.cell / name).read_bytes() for result in (first, second)}
        assert len(contents) == 1, "each cell has its own student"
    shutil.rmtree(tmp_path / "cells" / first.cell)
    run_grid(apply_overrides(only, ["evaluation.sizes=[128]"]), tmp_path, lambda *event: phases.append(event[3]))
    assert "distill" not in phases, "the copy serves others, too"
    assert run_grid(apply_overrides(again, ["seeds=[1]"]), tmp_path, ignore)[0].train_seconds != first.train_seconds


def test_every_seed_has_noise_of_its_own(grid: Grid, tmp_path: Path) -> None:
    untrained = grid.variants[1].model_copy(update={"trained": False, "name": "untrained"})
    both = grid.model_copy(update={"variants": (untrained,), "seeds": (0, 1)})
    first, second = run_grid(both, tmp_path, ignore)
    assert fidelity(first)[0].error_by_image != fidelity(second)[0].error_by_image


def test_samples_are_drawn_with_the_first_seed_alone(grid: Grid, tmp_path: Path) -> None:
    """The report has the samples of one seed; drawing them is no part of what identifies a cell."""
    two_seeds = apply_overrides(grid, ["seeds=[3, 1]"])
    run_grid(two_seeds, tmp_path, ignore, only="linear")
    folders = {cell.seed: tmp_path / "cells" / cell.id for cell in two_seeds.cells() if cell.variant.name == "linear"}
    assert (folders[3] / "samples" / "64" / "0.png").is_file()
    assert not (folders[1] / "samples").exists()
    assert all((folder / "arrays.safetensors").is_file() for folder in folders.values())
    cell = two_seeds.cells()[0]
    silent = cell.model_copy(update={"draws_samples": False})
    assert (silent.id, silent.training) == (cell.id, cell.training)


def test_a_training_is_identified_by_all_that_its_weights_depend_on(grid: Grid) -> None:
    def trainings(*settings: str) -> set[str]:
        return {cell.training for cell in apply_overrides(grid, list(settings)).cells()}

    assert len(trainings()) == 3
    assert trainings("evaluation.images=3", "variants.1.name=other", "variants.1.label=other") == trainings()
    for setting in ("seeds=[1]", "distillation.fit.steps=7", "distillation.images=9", "data=folder"):
        assert not trainings(setting) & trainings()
    assert len(trainings("variants.1.min_tokens=64") & trainings()) == 2


def test_the_training_key_changes_with_the_teacher_the_data_and_the_mixer(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thing at a time; what a configuration holds is tested above."""
    context = open_cell_context(grid)
    cell = grid.cells()[1]
    key = training_key(cell, context)
    assert training_key(cell, context) == key
    keys = {key}
    for part in (context.pipe.unet.conv_out, context.pipe.vae.encoder.conv_out):
        original = part.bias.detach().clone()
        with torch.no_grad():
            part.bias.add_(1)
            keys.add(training_key(cell, context))
            part.bias.copy_(original)
    more_images = cell.model_copy(update={"distillation": cell.distillation.model_copy(update={"images": 9})})
    keys.add(training_key(cell, open_cell_context(more_images)))
    monkeypatch.setattr(entries, "ENTRIES", dict(entries.ENTRIES))

    @register_mixer("another")
    class Another(LinearAttention):
        """A mixer that is defined in this file."""

    variant = cell.variant.model_copy(update={"mixer": "another"})
    keys.add(training_key(cell.model_copy(update={"variant": variant}), context))
    assert len(keys) == 5
    assert training_key(cell, context) == key


def test_a_run_is_continued_on_a_machine_that_rounds_differently(grid: Grid) -> None:
    """Processors differ in the last bits of latents; a run that moved to another one must keep its cells."""
    context = open_cell_context(grid)
    keys = [training_key(cell, context) for cell in grid.cells()]
    encoded = {
        size: {**batch, "latents": batch["latents"] * (1 + 1e-6)} for size, batch in context.encoded.sizes.items()
    }
    elsewhere = replace(context, encoded=replace(context.encoded, sizes=encoded))
    assert [training_key(cell, elsewhere) for cell in grid.cells()] == keys


def replace_setting(folder: Path, part: str, name: str, value: object) -> None:
    """Change one setting of a pipeline's part on disk."""
    file = next((folder / part).glob("*config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("scheduler", "prediction_type", "epsilon"), ("scheduler", "beta_end", 0.03), ("unet", "norm_eps", 0.1)],
)
def test_settings_beside_the_weights_identify_the_teacher(
    part: str, name: str, value: object, grid: Grid, tiny_teacher: Path, tmp_path: Path
) -> None:
    """With another one, students have another target, or the same weights compute something else."""
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    grid = grid.model_copy(update={"teacher": str(folder)})
    cell = grid.cells()[1]
    keys = set()
    teachers = set()
    for _ in range(2):
        context = open_cell_context(grid)
        keys.add(training_key(cell, context))
        teachers.add(protocol_of(context, grid.evaluation, grid.data).teacher)
        replace_setting(folder, part, name, value)
    assert len(keys) == len(teachers) == 2


def test_a_fingerprint_is_computed_again_only_after_a_change(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = open_teacher(grid.teacher)
    first = teacher.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "_add_network", lambda *_: pytest.fail("computed again"))
        assert teacher.fingerprint == first
    for network in (teacher.pipe.text_encoder, teacher.denoiser):
        before = teacher.fingerprint
        with torch.no_grad():
            next(network.parameters()).add_(1)
        assert teacher.fingerprint != before
    before = teacher.fingerprint
    teacher.denoiser.register_to_config(norm_eps=0.1)
    assert teacher.fingerprint != before


def test_a_teacher_interrupted_while_it_samples_draws_everything_again(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of the protocol before, and of a part of the guidance scales, never stay beside new students."""
    only = grid.model_copy(update={"variants": grid.variants[:1]})
    run_grid(apply_overrides(only, ["evaluation.guidances=[1.5,2.5]"]), tmp_path, ignore)
    (result,) = tmp_path.glob("cells/*/result.json")
    result.unlink()
    samples = tmp_path / "teacher" / "samples"
    old = {path.relative_to(samples): path.read_bytes() for path in samples.rglob("*.png")}
    changed = apply_overrides(only, ["evaluation.guidances=[1.5,3.5]", "evaluation.seed=7"])
    generate = samples_module.generate_images
    calls: list[object] = []

    def interrupt(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise Killed
        return generate(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(samples_module, "generate_images", interrupt)
        with pytest.raises(Killed):
            run_grid(changed, tmp_path, ignore)
    run_grid(changed, tmp_path, ignore)
    new = {path.relative_to(samples): path.read_bytes() for path in samples.rglob("*.png")}
    scales = {f"guidance-{scale:g}" for scale in changed.evaluation.all_guidances} - {
        f"guidance-{changed.evaluation.guidance:g}"
    }
    assert {path.parts[0] for path in new} == {"64", *scales}
    assert all(new[path] != old[path] for path in new.keys() & old.keys())
    times = {path: path.stat().st_mtime_ns for path in samples.rglob("*.png")}
    run_grid(changed, tmp_path, ignore)
    assert times == {path: path.stat().st_mtime_ns for path in samples.rglob("*.png")}, "drawn once"


def test_weights_of_another_teacher_are_not_reused(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that is trained further keeps its name; its students, finished or half trained, start again."""
    only = grid.model_copy(update={"variants": grid.variants[1:2]})
    run_grid(only, tmp_path, ignore)
    folder = tmp_path / "cells" / only.cells()[0].id
    for name in ("trained.json", "training.json"):
        (folder / name).write_text(json.dumps({"training": "another", "seconds": 1.0}))
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "training_key": "another"}))
    phases: list[str] = []
    run_grid(only, tmp_path, lambda *event: phases.append(event[3]))
    assert "distill" in phases
