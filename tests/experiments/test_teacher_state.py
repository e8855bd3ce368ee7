"""A teacher's training state: of one recipe, for one training at a time, and whole at every moment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from experiments.config import FitConfig
from experiments.core.locks import lock_folder
from experiments.teacher import train
from experiments.teacher.decay import decay_learning_rate
from experiments.teacher.export import export_state
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.restore import restore_state
from experiments.teacher.train import STAGES, open_encoder, open_tokenizer, train_teacher
from experiments.teacher.transformer import train_transformer
from tests.experiments import test_distributed
from tests.experiments.conftest import TINY


def changed(stage: str, **fields: Any) -> TeacherRecipe:
    return TINY.model_copy(update={stage: getattr(TINY, stage).model_copy(update=fields)})


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    train_teacher(directory, TINY)
    return directory


@pytest.fixture
def state(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "state")


OTHERS = {
    "architecture": TINY.model_copy(update={"text_width": 16}),
    "vae": changed("vae", steps=1),
    "decoder": changed("decoder", steps=3),
    "judge": changed("judge", learning_rate=1e-2),
    "unet": changed("unet", optimizer="muon"),
}


@pytest.mark.parametrize("part", OTHERS)
def test_a_state_of_another_recipe_is_refused_and_stays(part: str, state: Path) -> None:
    before = contents(state)
    with pytest.raises(ValueError, match=f"a run of another {part}, see run.json there: give another --state"):
        train_teacher(state, OTHERS[part])
    assert contents(state) == before


@pytest.mark.parametrize("part", ["architecture", "unet"])
def test_a_decay_continues_its_own_recipe_only(part: str, state: Path) -> None:
    with pytest.raises(ValueError, match=f"another {part}"):
        decay_learning_rate(state, OTHERS[part])
    if part == "architecture":
        with pytest.raises(ValueError, match="another architecture"):
            train_transformer(state, OTHERS[part], stage="unet")


def test_what_a_stage_does_not_use_may_differ(state: Path) -> None:
    train_teacher(state, OTHERS["judge"], stages=("decoder",))
    train_teacher(state, changed("unet", steps=3, batch_size=8, log_every=1))


def test_a_state_that_names_no_recipe_is_accepted_and_named(state: Path) -> None:
    """States from before recipes were written; a trial with fewer steps is refused all the same."""
    named = json.loads((state / "run.json").read_text())
    (state / "run.json").unlink()
    before = contents(state)
    with pytest.raises(ValueError, match="its stage vae has 2 steps, and this recipe has only 1"):
        train_teacher(state, TINY.scaled(0.001), stages=("unet",))
    assert contents(state) == before
    decay_learning_rate(state, TINY.model_copy(update={"decay": 1}))
    assert json.loads((state / "run.json").read_text()) == named


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # "other" is of no field's type
def test_the_identity_has_every_field_but_those_that_may_change() -> None:
    free = {"decay", "decay_ema"}
    free |= {f"{stage}.{name}" for stage in ("unet", "dit") for name in ("steps", "batch_size", "mixed_precision")}
    stages = ("vae", "decoder", "unet", "dit", "judge")
    free |= {f"{stage}.{name}" for stage in stages for name in ("checkpoint_every", "keep", "log_every", "trackers")}
    fields = {name for name in TeacherRecipe.model_fields if name not in stages}
    fields |= {f"{stage}.{name}" for stage in stages for name in FitConfig.model_fields}
    assert free < fields
    for field in fields:
        stage, _, name = field.rpartition(".")
        change = {name: "other"}
        other = changed(stage, **change) if stage else TINY.model_copy(update=change)
        assert (other.identity() == TINY.identity()) == (field in free), field


def test_a_state_restored_from_an_export_is_trained_further(state: Path, tmp_path: Path) -> None:
    """Its export is the same again, and what was complete is not trained again."""
    export = export_state(tmp_path / "export", state, TINY)
    restored = tmp_path / "restored"
    assert restore_state(restored, export, TINY) == TINY.unet.steps
    again = export_state(tmp_path / "again", restored, TINY)
    for path in export.rglob("*.safetensors"):
        before = safetensors.torch.load_file(path)
        after = safetensors.torch.load_file(again / path.relative_to(export))
        assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before), path.name
    assert (again / "training.json").read_text() == (export / "training.json").read_text()
    trained: list[str] = []
    longer = changed("unet", steps=TINY.unet.steps + 1)
    train_teacher(restored, longer, lambda stage, *_: trained.append(stage))
    assert trained == ["unet"]
    with pytest.raises(ValueError, match="it exists"):
        restore_state(restored, export, TINY)


def test_what_no_state_can_be_restored_from_is_refused(state: Path, tmp_path: Path) -> None:
    export = export_state(tmp_path / "export", state, TINY)
    with pytest.raises(ValueError, match="another architecture"):
        restore_state(tmp_path / "restored", export, OTHERS["architecture"])
    (export / "training.json").write_text("{")
    with pytest.raises(ValueError, match="is missing or damaged"):
        restore_state(tmp_path / "restored", export, TINY)
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("stage", ["vae", *STAGES])
def test_a_stage_is_trained_by_one_process_at_a_time(stage: str, state: Path) -> None:
    if stage == "vae":
        shutil.rmtree(state / "encoder")
    with (
        lock_folder(state / stage, "training of the teacher"),
        pytest.raises(ValueError, match=rf"Another training of the teacher is running in .*{stage}\."),
    ):
        train_teacher(state, TINY)
    train_teacher(state, TINY)


def test_a_decay_starts_again_from_a_newer_state_and_is_locked(state: Path) -> None:
    recipe = TINY.model_copy(update={"decay": 2})
    decay_learning_rate(state, recipe)
    files = state / "decay" / "checkpoints"
    assert max(path.name for path in files.glob("*.safetensors")) == "step-00000004.safetensors"
    first = contents(files)
    decay_learning_rate(state, recipe)
    assert contents(files) == first, "nothing is done twice"
    longer = changed("unet", steps=3).model_copy(update={"decay": 2})
    train_teacher(state, longer, stages=("unet",))
    with lock_folder(state / "decay", "training of the teacher"), pytest.raises(ValueError, match="Another training"):
        decay_learning_rate(state, longer)
    decay_learning_rate(state, longer)
    assert [path.name for path in (state / "decay").glob("from-*")] == ["from-3"]
    steps = [json.loads(line)["step"] for line in (state / "decay" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [5]


@pytest.mark.parametrize("part", ["encoder", "tokenizer"])
def test_a_folder_that_cannot_be_written_whole_does_not_appear(
    part: str, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later training would use half of it, silently."""
    shutil.rmtree(state / part)

    def fail(_: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    kind = {"encoder": train.AutoencoderKL, "tokenizer": train.CLIPTokenizer}[part]
    with monkeypatch.context() as patch:
        patch.setattr(kind, "save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            train_teacher(state, TINY)
    assert not list(state.glob(f"{part}*"))
    train_teacher(state, TINY)


@pytest.mark.parametrize("device", ["foo", "cuda:99", "cpu:0"])
def test_a_device_is_checked_before_anything_is_trained(device: str, state: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device"):
        train_teacher(tmp_path / "new", TINY, device=device)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="device"):
        decay_learning_rate(state, TINY, device=device)
    assert not (state / "decay").exists()


def test_a_decay_without_a_trained_unet_trains_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train first"):
        decay_learning_rate(tmp_path, TINY)
    assert not list(tmp_path.iterdir())


TRAIN_AND_DECAY = """
import sys
from pathlib import Path

from experiments.teacher.decay import decay_learning_rate
from experiments.teacher.recipe import TeacherRecipe
from experiments.teacher.train import train_teacher

folder = Path(sys.argv[1])
recipe = TeacherRecipe.model_validate_json((folder.parent / "recipe.json").read_text())
train_teacher(folder, recipe)
decay_learning_rate(folder, recipe)
"""


@pytest.mark.slow
def test_two_processes_train_one_state_together(tmp_path: Path) -> None:
    """From nothing: one of them writes the recipe, the encoder and the tokenizer, and locks the stages."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN_AND_DECAY)
    (tmp_path / "recipe.json").write_text(TINY.model_copy(update={"decay": 1}).model_dump_json())
    test_distributed.run(tmp_path / "state", 2, str(script))
    state = tmp_path / "state"
    assert json.loads((state / "run.json").read_text()) == TINY.identity()
    assert not list(state.rglob("*.partial"))
    for stage, step in (("unet", 2), ("decay", 3)):
        file = state / stage / "checkpoints" / f"step-{step:08d}.safetensors"
        assert safetensors.torch.load_file(file)
    assert open_tokenizer(state, TINY) and open_encoder(state, TINY)
