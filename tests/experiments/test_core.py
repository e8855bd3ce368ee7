"""The ground floor: files, locks, errors, signals, registries."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from experiments.core.devices import available_cores, check_device, threads_per_process
from experiments.core.environment import describe_environment
from experiments.core.errors import first_line
from experiments.core.files import (
    read_identity,
    read_json,
    require_same_inputs,
    save_folder,
    sha256_of_file,
    write_bytes,
    write_json,
    write_text,
)
from experiments.core.locks import is_locked, lock_folder, try_lock
from experiments.core.registry import Registry
from experiments.core.signals import Interrupted
from mixers.files import atomic_path
from mixers.suggest import unknown_name
from unet_adapters.files import save_tensors


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        partial.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_folder_is_created_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "made") as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
        raise RuntimeError
    assert not os.listdir(tmp_path)
    with atomic_path(tmp_path / "made", durable=True) as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
    assert (tmp_path / "made" / "a").read_text() == "1"


def test_two_processes_that_write_one_file_use_two_partial_files(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file") as partial:
        assert str(os.getpid()) in partial.name
        partial.touch()


def test_json_is_read_back_and_damaged_json_is_empty(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "é", "n": 1})
    assert read_json(tmp_path / "a.json") == {"name": "é", "n": 1}
    for damaged in ("{", "[1]", ""):
        (tmp_path / "b.json").write_text(damaged)
        assert read_json(tmp_path / "b.json") == {}
    assert read_json(tmp_path / "missing.json") == {}


def test_a_folder_of_unknown_origin_is_not_continued(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    result = tmp_path / "stage" / "weights.safetensors"
    assert read_identity(file, [result]) == {}, "nothing is there yet"
    write_json(result, {})
    with pytest.raises(ValueError, match=r"it has stage/weights.safetensors, but no run\.json"):
        read_identity(file, [tmp_path / "missing", result])
    write_json(file, {"teacher": "embedded"})
    assert read_identity(file, [result]) == {"teacher": "embedded"}
    for content in ("", "null", "[1]", '{"teacher": ', "[" * 100_000):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"run\.json, which says what it was made from, is damaged"):
            read_identity(file, [result])


def test_a_folder_of_other_inputs_is_not_continued(tmp_path: Path) -> None:
    """Every input counts, one that the folder's file does not have included; all that differ are named."""
    file = tmp_path / "run.json"
    inputs = {"recipe": {"steps": 2}, "plugin_source": "a"}
    assert not require_same_inputs(file, inputs)
    write_json(file, inputs)
    assert require_same_inputs(file, inputs)
    with pytest.raises(ValueError, match=r"another recipe and another plugin source, see run\.json there"):
        require_same_inputs(file, {"recipe": {"steps": 3}, "plugin_source": "b"})
    with pytest.raises(ValueError, match=r"a run of another teacher, see run\.json there: give another --state"):
        require_same_inputs(file, {**inputs, "teacher": "new"}, option="--state")


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with pytest.raises(OSError, match=r"Cannot write .*model: .*No space left"):
        save_folder(tmp_path / "model", fail)
    assert not list(tmp_path.iterdir())
    save_folder(tmp_path / "model", Path.mkdir)
    assert (tmp_path / "model").is_dir()


@pytest.mark.parametrize("device", ["", "foo", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "cuda:99"])
def test_a_device_that_does_not_exist_is_refused(device: str) -> None:
    check_device("cpu")
    with pytest.raises(ValueError, match="device"):
        check_device(device)


def test_tensors_that_cannot_be_written_are_an_oserror_that_names_the_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2, 3).T}, {"key": "value"})
    assert load_file(tmp_path / "a.safetensors")["x"].shape == (3, 2)
    assert len(sha256_of_file(tmp_path / "a.safetensors") or "") == 64
    assert sha256_of_file(tmp_path / "missing") is None
    tied = torch.ones(4)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").touch()
    with pytest.raises(OSError, match="folder"):
        save_tensors(tmp_path / "folder", {"x": tied})


def _hold(folder: Path, held: multiprocessing.synchronize.Event, release: multiprocessing.synchronize.Event) -> None:
    with try_lock(folder):
        held.set()
        release.wait()


def test_a_lock_is_one_process_s_and_ends_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    release = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, release), daemon=True)
    process.start()
    held.wait()
    assert is_locked(tmp_path)
    with try_lock(tmp_path) as acquired:
        assert not acquired
    with pytest.raises(ValueError, match="Another distillation is running in"), lock_folder(tmp_path, "distillation"):
        raise AssertionError
    process.kill()
    process.join()
    assert not is_locked(tmp_path)
    with lock_folder(tmp_path, "distillation"):
        pass


def test_messages_about_unknown_names() -> None:
    assert unknown_name("split", "tain", ["train", "held_out"]) == (
        "Unknown split 'tain': expected one of train, held_out. Did you mean 'train'?"
    )
    assert unknown_name("recipe", "x", ["a"], "the path of a .yaml file") == (
        "Unknown recipe 'x': expected one of a, or the path of a .yaml file."
    )
    assert unknown_name("option", "x", []) == "Unknown option 'x': expected none."
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_exit_codes_are_those_of_shells() -> None:
    assert Interrupted("stopped").exit_code == 130
    assert Interrupted("stopped", signal.SIGTERM).exit_code == 143


def test_each_process_gets_a_share_of_the_cores() -> None:
    assert threads_per_process(1) == available_cores()
    assert threads_per_process(10_000) == 1
    assert {"python", "torch", "device", "commit"} <= describe_environment().keys()


def test_a_registry_names_what_it_has() -> None:
    registry: Registry[type] = Registry("shape")

    @registry.register("circle")
    @dataclass(frozen=True)
    class Circle:
        radius: float = 1.0

    assert registry.names() == ["circle"]
    assert registry.get("circle") is Circle
    assert registry.create("circle", radius=2.0) == Circle(2.0)
    assert dict(registry.items()) == {"circle": Circle}
    assert registry.names_from(__name__) == ["circle"]
    with pytest.raises(ValueError, match=r"Unknown shape 'circl': expected one of circle. Did you mean 'circle'\?"):
        registry.get("circl")
    with pytest.raises(ValueError, match=r"Unknown option of the shape circle 'radios': .* Did you mean 'radius'\?"):
        registry.create("circle", radios=2.0)
    registry.register("circle")(Circle)
    with pytest.raises(ValueError, match="has that name"):
        registry.register("circle")(Path)


def test_a_registry_discovers_the_modules_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "discovered_shapes"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from experiments.core.registry import Registry\nREGISTRY = Registry('shape', 'discovered_shapes')\n"
    )
    (package / "square.py").write_text(
        "from discovered_shapes import REGISTRY\n@REGISTRY.register('square')\nclass Square: pass\n"
    )
    (package / "_private.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import discovered_shapes  # type: ignore[import-not-found]

    assert discovered_shapes.REGISTRY.names() == ["square"]
