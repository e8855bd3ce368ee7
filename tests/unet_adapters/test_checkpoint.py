"""Adapters on disk: round trips, other UNets, damaged files."""

from __future__ import annotations

import importlib
import json
import shutil
from copy import deepcopy
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import RepoUrl, errors
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file

from mixers import list_mixers
from unet_adapters import MixerAdapter
from unet_adapters.checkpoint import DESCRIPTION, WEIGHTS

HTTP = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # httpx or httpx2


@pytest.fixture
def saved(unet, tmp_path) -> Path:
    MixerAdapter.build(unet, "linfusion").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", list_mixers())
@pytest.mark.parametrize("train_projections", [True, False])
@torch.no_grad()
def test_round_trip_is_bitwise(unet, run, tmp_path, name, train_projections) -> None:
    other = deepcopy(unet)
    adapter = MixerAdapter.build(unet, name, select="every:2", train_projections=train_projections)
    for parameter in adapter.student.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    with adapter.mounted():
        mounted = run(unet)
        adapter.save_pretrained(tmp_path)
    again = MixerAdapter.from_pretrained(tmp_path, other)
    assert not again.is_mounted and again.sites == adapter.sites
    assert {key: m.config for key, m in again.mixers.items()} == {key: m.config for key, m in adapter.mixers.items()}
    with again.mounted():
        assert torch.equal(run(other), mounted)
    assert torch.equal(run(other), run(unet))
    assert sorted(path.name for path in tmp_path.iterdir()) == [DESCRIPTION, WEIGHTS]


def test_options_survive_the_round_trip(unet, tmp_path) -> None:
    adapter = MixerAdapter.build(unet, "linear_attention", causality="causal", normalize=False)
    adapter.save_pretrained(tmp_path)
    config = next(iter(MixerAdapter.from_pretrained(tmp_path, unet).mixers.values())).config
    assert config == next(iter(adapter.mixers.values())).config
    assert config != next(iter(MixerAdapter.build(unet, "linear_attention").mixers.values())).config


def test_the_files_hold_the_adapter_only(unet, saved) -> None:
    description = json.loads((saved / DESCRIPTION).read_text())
    sites = list(description["sites"])
    assert description["format"] == 1 and description["fingerprint"].keys() == set(sites)
    names = load_file(saved / WEIGHTS)
    assert all(name.startswith(tuple(sites)) for name in names)
    assert any(".mixer." in name for name in names) and any(".to_out.0.weight" in name for name in names)


def test_another_unet_is_refused_and_the_sites_named(saved) -> None:
    config = {"norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 12, "layers_per_block": 1}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    blocks["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    other = UNet2DConditionModel(block_out_channels=(16, 16), **blocks, **config)
    with pytest.raises(ValueError, match="made for another model") as caught:
        MixerAdapter.from_pretrained(saved, other)
    message = str(caught.value)
    assert "down_blocks.0" in message and "up_blocks.1" in message and "mid_block" not in message


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def edit(key: str, value: object):
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def edit_config(option: str, value: object):
    """Change an option of the first site's mixer."""

    def change(path: Path) -> None:
        description = json.loads(path.read_text())
        next(iter(description["sites"].values()))["config"][option] = value
        path.write_text(json.dumps(description))

    return change


DAMAGE = {
    "weights truncated": (WEIGHTS, truncate, ValueError, "truncated"),
    "weights flipped": (WEIGHTS, flip, ValueError, "damaged"),
    "weights empty": (WEIGHTS, lambda path: path.write_bytes(b""), ValueError, "truncated"),
    "weights missing": (WEIGHTS, Path.unlink, FileNotFoundError, "no weights"),
    "description truncated": (DESCRIPTION, truncate, ValueError, "damaged"),
    "description not a dict": (DESCRIPTION, lambda path: path.write_text("[1]"), ValueError, "damaged"),
    "description missing": (DESCRIPTION, Path.unlink, FileNotFoundError, "not an adapter"),
    "newer format": (DESCRIPTION, edit("format", 2), ValueError, "reads format 1"),
    "sites missing": (DESCRIPTION, edit("sites", None), ValueError, "damaged"),
    "threshold below zero": (DESCRIPTION, edit("min_tokens", -1), ValueError, "damaged"),
    "threshold of another type": (DESCRIPTION, edit("min_tokens", True), ValueError, "damaged"),
    "option of another type": (DESCRIPTION, edit_config("conv_size", "3"), ValueError, "conv_size to be a whole num"),
    "an option more": (DESCRIPTION, edit_config("gate", True), ValueError, r"does not fit .*Missing key\(s\)[^\n]*$"),
    "unknown site": (DESCRIPTION, edit("sites", {"x": {"mixer": "linfusion", "config": {}}}), ValueError, "damaged"),
}


@pytest.mark.parametrize(("file", "damage", "kind", "message"), DAMAGE.values(), ids=DAMAGE)
@torch.no_grad()
def test_damaged_files_are_one_clear_error(unet, run, saved, file, damage, kind, message) -> None:
    base = run(unet)
    damage(saved / file)
    with pytest.raises(kind, match=message):
        MixerAdapter.from_pretrained(saved, unet)
    assert torch.equal(run(unet), base)


def test_saving_again_replaces_both_files(unet, saved) -> None:
    MixerAdapter.build(unet, "linear_attention", train_projections=False, select="mid_block").save_pretrained(saved)
    again = MixerAdapter.from_pretrained(saved, unet)
    assert [site.group for site in again.sites] == ["mid_block"] and not again.train_projections


def test_a_source_that_is_no_directory_and_no_repository(unet, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a directory nor a Hub repository"):
        MixerAdapter.from_pretrained(tmp_path / "nowhere", unet)


@pytest.mark.parametrize("error", [HTTP.ProxyError("403 Forbidden"), HTTP.ConnectError("no route")], ids=repr)
def test_a_repository_that_cannot_be_reached_is_one_clear_error(unet, monkeypatch, error) -> None:
    def fail(source: str, allow_patterns: list[str]) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=f"nor a Hub repository that can be downloaded: {error}"):
        MixerAdapter.from_pretrained("somebody/adapter", unet)


class Hub:
    """A Hub in a folder, behind the two calls that are made."""

    def __init__(self, folder: Path, error: Exception | None = None) -> None:
        self.folder = folder
        self.error = error

    def __call__(self, token: str | None) -> Hub:
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> RepoUrl:
        if self.error:
            raise self.error
        validate_repo_id(repo_id)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        shutil.copytree(folder_path, self.folder / repo_id)


@torch.no_grad()
def test_what_is_pushed_is_what_is_loaded(unet, run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda source, allow_patterns: tmp_path / source)
    monkeypatch.chdir("/")
    adapter = MixerAdapter.build(unet, "linfusion")
    assert adapter.push_to_hub("somebody/adapter") == "https://huggingface.co/somebody/adapter"
    assert sorted(path.name for path in (tmp_path / "somebody/adapter").iterdir()) == [DESCRIPTION, WEIGHTS]
    with adapter.mounted():
        expected = run(unet)
    with MixerAdapter.from_pretrained("somebody/adapter", unet).mounted():
        assert torch.equal(run(unet), expected)


@pytest.mark.parametrize(
    ("repo_id", "error", "kind", "message"),
    [
        ("a/b/c", None, ValueError, "not a valid id of a Hub repository"),
        ("a/b", LocalTokenNotFoundError("no token"), ConnectionError, "not uploaded to a/b: no token"),
        ("a/b", OSError("no route"), ConnectionError, "hf auth login"),
        ("a/b", HTTP.ConnectError("no route"), ConnectionError, "not uploaded to a/b: no route"),
        ("a/b", HTTP.ReadTimeout(""), ConnectionError, "not uploaded to a/b: ReadTimeout"),
    ],
)
def test_what_cannot_be_pushed_is_one_clear_error(unet, tmp_path, monkeypatch, repo_id, error, kind, message) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(tmp_path, error))
    with pytest.raises(kind, match=message):
        MixerAdapter.build(unet, "linfusion").push_to_hub(repo_id)


@pytest.mark.parametrize("save", ["save_pretrained", "save_linfusion"])
def test_a_full_disk_is_an_oserror_and_leaves_the_old_files(
    unet: UNet2DConditionModel, save: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = MixerAdapter.build(unet, "linfusion")
    getattr(adapter, save)(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_arguments: object, **_options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def fail_to_write(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unet_adapters.files.save_file", fail)
    monkeypatch.setattr(Path, "write_bytes", fail_to_write)
    with pytest.raises(OSError, match="No space left on device"):
        getattr(adapter, save)(tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
