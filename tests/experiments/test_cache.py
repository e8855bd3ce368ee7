"""The latent cache: every row where it belongs, resumable byte for byte, and nothing stale or damaged is read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from experiments.config import FitConfig
from experiments.core.locks import LOCK, is_locked, lock_folder
from experiments.data import BadRecord, DataError, DataRecord, EmojiSet, Example, Size, batch, extent
from experiments.distill.batches import draw_batch
from experiments.distill.cache import LatentCache, open_cache
from experiments.distill.cache_builder import build_cache
from experiments.distill.cache_index import CacheError
from experiments.teacher.load import open_teacher
from experiments.teacher.teacher import Batch, Teacher
from tests.unet_adapters import pipelines

Killed = KeyboardInterrupt  # no Exception, as a kill is none


@dataclass
class Fake:
    """An encoder that can be checked by eye: latents are shrunk images, text is the caption's numbers."""

    encoder_fingerprint: str = "f"
    pipe: Any = field(default_factory=lambda: SimpleNamespace(vae_scale_factor=4))
    encoded: int = 0
    budget: int = 10**9
    scale: float = 1.0

    def encode_images(self, images: Tensor) -> Batch:
        self.encoded += len(images)
        if self.encoded > self.budget:
            raise Killed
        return {"latents": F.avg_pool2d(images, 4) * self.scale, "time_ids": torch.full((len(images), 6), 1032.0)}

    def conditions(self, captions: list[str]) -> Batch:
        values = torch.tensor([[float(c)] for c in captions])
        return {"text": values.view(-1, 1, 1).repeat(1, 2, 3), "pooled": -values}

    @property
    def unconditional(self) -> Batch:
        return {"text": torch.zeros(2, 3), "pooled": torch.zeros(1)}


@dataclass
class Numbers:
    """Records 0, 1, 2, …: an image of one value, which the caption names; some cannot be used; two have one caption."""

    count: int
    bad: frozenset[int] = frozenset()
    name: str = "numbers"
    shift: int = 0
    content: str = ""

    def records(self, seed: int = 0) -> Iterator[DataRecord]:
        return (_Number(n, n in self.bad, self.shift + seed, self.content) for n in range(self.count))


@dataclass
class _Number:
    number: int
    bad: bool
    shift: int
    content: str

    @property
    def key(self) -> str:
        return f"record {self.number + self.shift}"

    def digest(self) -> str:
        return f"{self.key} {self.content}"

    def example(self, size: Size, variation: int = 0) -> Example:
        if self.bad:
            raise BadRecord("too bad")
        value = (self.number + 1000 * variation) / 4096
        return Example(torch.full((3, *extent(size)), value), str(self.number // 2), self.key)


def build(directory: Path, teacher: Any = None, data: Any = None, **more: Any) -> LatentCache:
    options = {"sizes": [8], "images": 10, "shard": 4, "batch_size": 3, **more}
    return build_cache(teacher or Fake(), data or Numbers(10), directory, **options)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != LOCK}


# --- one process at a time ----------------------------------------------------------------------


def test_one_process_at_a_time_encodes_what_is_missing(tmp_path: Path) -> None:
    """Two that write one cache would mix their indices; a finished one is shared, whoever holds the lock."""
    cache = tmp_path / "cache"
    with lock_folder(cache, "encoding"), pytest.raises(ValueError, match=r"Another encoding is running in .*cache"):
        build(cache)
    assert not list(cache.glob("*.safetensors"))
    build(cache)
    with lock_folder(cache, "encoding"):
        assert len(build(cache)) == 10
        next(cache.glob("latents-*")).write_bytes(b"damaged")
        with pytest.raises(ValueError, match="Another encoding is running"):
            build(cache)
    assert len(build(cache)) == 10


def test_the_cache_is_locked_while_it_is_built(tmp_path: Path) -> None:
    states: list[bool] = []
    build(tmp_path / "cache", progress=lambda *_: states.append(is_locked(tmp_path / "cache")))
    assert states and all(states)


# --- every image where it belongs ---------------------------------------------------------------


@given(st.data())
def test_a_batch_is_the_rows_asked_for(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9), "records")
    variations = data.draw(st.integers(1, 3), "variations")
    bad = data.draw(st.frozensets(st.integers(0, count - 1), max_size=count - 1), "bad")
    images = data.draw(st.integers(1, 30), "images")
    shard = data.draw(st.integers(1, 7), "shard")
    sizes = [8, (4, 12)]
    cache = build(
        tmp_path_factory.mktemp("cache"),
        data=Numbers(count, bad),
        sizes=sizes,
        images=images,
        shard=shard,
        variations=variations,
        batch_size=data.draw(st.integers(1, 5), "batch size"),
    )
    expected = [(n, v) for n in range(count) if n not in bad for v in range(variations)][:images]
    assert len(cache) == len(expected) and cache.sizes == ((8, 8), (4, 12))
    rows = data.draw(st.lists(st.integers(0, len(cache) - 1), min_size=1, max_size=12), "rows")
    for size in sizes:
        tensors = cache.batch(rows, size)
        assert tensors["latents"].shape == (len(rows), 3, extent(size)[0] // 4, extent(size)[1] // 4)
        for row, latents, text, pooled in zip(
            rows, tensors["latents"], tensors["text"], tensors["pooled"], strict=True
        ):
            number, variation = expected[row]
            assert (latents == (number + 1000 * variation) / 4096).all()
            assert (text == number // 2).all() and (pooled == -(number // 2)).all()
        assert (tensors["time_ids"] == 1032).all()
    if len(cache) < images:  # all were read
        assert sum(cache.skipped.values()) == len(bad) * variations


@pytest.mark.parametrize("family", ["text-to-image", "SDXL", "embedded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_is_what_the_teacher_encodes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = open_teacher() if family == "embedded" else Teacher(pipelines.make(family))
    data = EmojiSet()
    sizes = (32, (32, 64))
    cache = build(tmp_path, teacher, data, sizes=sizes, images=6, shard=4, variations=2, dtype=dtype)
    keys = [record.key for record in islice(data.records(), 3)]
    records = [next(i for i in range(len(data)) if data.key(i) == key) for key in keys]
    for size in sizes:
        images, captions = batch(data, [i for i in records for _ in (0, 1)], size, [0, 1] * 3)
        direct = teacher.encode(images, captions)
        cached = cache.batch(range(6), size)
        assert set(cached) == set(direct)
        for name, value in cached.items():
            assert value.dtype == (torch.float32 if name == "time_ids" else dtype)
            torch.testing.assert_close(
                value.float(), direct[name].float(), rtol=2e-3, atol=2e-3 if dtype == torch.float16 else 1e-5
            )
    for name, value in cache.unconditional.items():
        assert torch.equal(value, teacher.unconditional[name].to(dtype))


def test_a_stage_draws_from_it(tmp_path: Path) -> None:
    cache = build(tmp_path, sizes=[8, 16])
    fit = FitConfig(steps=3, batch_size=5, learning_rate=1e-3)
    examples = draw_batch(cache, 1, fit, 1000, (8, 16), caption_dropout=1.0)
    assert examples["latents"].shape == (5, 3, 4, 4) and not examples["text"].any() and not examples["pooled"].any()


def test_captions_that_repeat_are_stored_once(tmp_path: Path) -> None:
    cache = build(tmp_path, images=10, variations=2)
    with safe_open(tmp_path / "text-00000.safetensors", "pt") as file:
        assert file.get_tensor("text").shape == (1, 2, 3), "records 0 and 1, two variations each: one caption"
        header = json.loads(file.metadata()["cache"])
    expected = {"format": 2, "teacher": "f", "data": "numbers", "sizes": [[8, 8]], "start": 0, "stop": 4}
    assert expected.items() <= header.items() and header["records"] == cache.contents["records"]


def test_it_can_be_pickled_and_asked_wrongly(tmp_path: Path) -> None:
    cache = build(tmp_path, sizes=[8, (4, 12)])
    first = cache.batch([3, 9])
    copy = pickle.loads(pickle.dumps(cache))
    assert all(torch.equal(value, first[name]) for name, value in copy.batch([3, 9]).items())
    assert len(pickle.dumps(cache)) < 10_000
    with pytest.raises(CacheError, match="no images of 16x16: it has 8x8, 4x12"):
        cache.batch([0], 16)
    for rows in ([10], [-1]):
        with pytest.raises(IndexError, match="from 0 to 9"):
            cache.batch(rows)


# --- stopped and started again --------------------------------------------------------------------


@pytest.mark.parametrize("images", range(0, 44, 3))
def test_a_killed_build_continues_and_ends_with_the_same_bytes(images: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "data": Numbers(14, frozenset({1, 5, 6})),
        "sizes": [8, 12],
        "images": 20,
        "variations": 2,
    }
    build(tmp_path / "undisturbed", **options)
    teacher = Fake(budget=images)
    try:
        build(tmp_path / "killed", teacher, **options)
    except Killed:
        with pytest.raises(CacheError, match="it is not finished"):
            open_cache(tmp_path / "killed")
    left = Fake()
    build(tmp_path / "killed", left, **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    whole = min(teacher.encoded, images) // 8 * 8  # four images at two sizes a shard
    assert left.encoded == 40 - whole, "whole shards are not encoded again"
    idle = Fake(budget=0)
    assert len(build(tmp_path / "killed", idle, **options)) == 20


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])])
@pytest.mark.parametrize("number", range(3))
def test_a_damaged_file_alone_is_made_again(number: int, damage: Callable[[Path], None], tmp_path: Path) -> None:
    data = Numbers(11, frozenset({2}))
    build(tmp_path, data=data)
    before = contents(tmp_path)
    for name in ("latents-8x8", "text"):
        damage(tmp_path / f"{name}-0000{number}.safetensors")
        mender = Fake()
        build(tmp_path, mender, data)
        assert contents(tmp_path) == before and mender.encoded == (2 if number == 2 else 4)


def test_data_that_changed_further_on_is_not_mixed_in(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "text-00001.safetensors").unlink()
    with pytest.raises(CacheError, match="numbers has changed since"):
        build(tmp_path, data=Numbers(10, frozenset({5})))


# --- stale or damaged -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": Fake("other")}, 'teacher: has "f", requested "other"'),
        ({"data": Numbers(10, name="others")}, 'data: has "numbers", requested "others"'),
        ({"data": Numbers(10, shift=1)}, "records: has "),
        ({"data": Numbers(11)}, "records: has "),
        ({"data": Numbers(10, content="edited")}, "records: has "),
        ({"sizes": [8, 16]}, r"sizes: has \[\[8, 8\]\], requested \[\[8, 8\], \[16, 16\]\]"),
        ({"images": 9}, "images: has 10, requested 9"),
        ({"seed": 1}, "seed: has 0, requested 1"),
        ({"variations": 2}, "variations: has 1, requested 2"),
        ({"dtype": torch.bfloat16}, 'dtype: has "float32", requested "bfloat16"'),
        ({"shard": 5}, "shard: has 4, requested 5"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_stale_cache_is_refused_with_what_differs(
    change: dict[str, Any], message: str, finished: bool, tmp_path: Path
) -> None:
    if finished:
        build(tmp_path)
    else:
        with pytest.raises(Killed):
            build(tmp_path, Fake(budget=5))
    before = contents(tmp_path)
    with pytest.raises(CacheError, match=message):
        build(tmp_path, **change)
    assert contents(tmp_path) == before


def test_another_teacher_cannot_open_it(tmp_path: Path) -> None:
    teacher: Any = Fake()
    build(tmp_path, teacher)
    assert len(open_cache(tmp_path, teacher)) == len(open_cache(tmp_path)) == 10
    other: Any = Fake("other")
    with pytest.raises(CacheError, match='teacher: has "f", requested "other"'):
        open_cache(tmp_path, other)


@given(st.data())
def test_any_byte_that_changed_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.getbasetemp() / "flipped"
    cache = build(directory)
    sound = {key: value.clone() for key, value in cache.batch(range(10)).items()}
    path = directory / data.draw(st.sampled_from(sorted(contents(directory))), "file")
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1), "byte")
    bit = data.draw(st.integers(0, 7), "bit")
    try:
        path.write_bytes(original[:place] + bytes([original[place] ^ 1 << bit]) + original[place + 1 :])
        tensors: Batch = {}
        with pytest.raises(CacheError, match=f"is damaged: {path.name}") if path.suffix != ".json" else noticed():
            cache = open_cache(directory)
            tensors = {**cache.batch(range(10)), "blank": cache.unconditional["text"]}
        assert all(torch.equal(value, sound[key]) for key, value in tensors.items() if key in sound)
    finally:
        path.write_bytes(original)


class noticed:
    """Of JSON, spaces may turn into other spaces: no error then, and nothing changes."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> bool:
        return kind is None or isinstance(error, CacheError)


@pytest.mark.parametrize("keep", [0, 7, 100])
def test_truncated_files_are_named(keep: int, tmp_path: Path) -> None:
    build(tmp_path)
    for name in ("latents-8x8-00001.safetensors", "text-00002.safetensors", "unconditional.safetensors"):
        path = tmp_path / name
        original = path.read_bytes()
        path.write_bytes(original[:keep])
        for verify in (True, False):  # safetensors itself notices a wrong length
            cache = open_cache(tmp_path, verify=verify)
            with pytest.raises(CacheError, match=rf"is damaged: {name} .* Call build_cache"):
                cache.batch(range(10)) and cache.unconditional
        path.write_bytes(original)


# --- what cannot be built -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"sizes": [8, 10, (8, 6)]}, CacheError, "Cannot encode at 10x10, 8x6: expected multiples of 4"),
        ({"sizes": []}, CacheError, "Cannot encode at no size"),
        ({"sizes": [0]}, CacheError, "Cannot encode at 0x0"),
        ({"images": 0}, CacheError, "at least 1, got 0"),
        ({"data": Numbers(3, frozenset(range(3)))}, DataError, "No usable record in numbers"),
        ({"data": Numbers(0)}, DataError, "No usable record in numbers"),
        (
            {"teacher": Fake(scale=float("inf"))},
            CacheError,
            "Cannot cache latents: some values are not finite in float32",
        ),
        ({"teacher": Fake(scale=1e9), "dtype": torch.float16}, CacheError, "not finite in float16"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(
    change: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        build(tmp_path, **change)


def test_bad_records_are_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        cache = build(tmp_path, data=Numbers(9, frozenset({0, 4, 7, 8})), images=100)
    assert len(cache) == 5 and cache.skipped == open_cache(tmp_path).skipped == {"too bad": 4}
    assert "Skipped record 4: too bad" in caplog.text and "numbers: 5 used, 4 skipped (4 × too bad)" in caplog.text


def test_no_cache_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"there is no index\.json"):
        open_cache(tmp_path)
