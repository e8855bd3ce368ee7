"""The table of hosts and operations in docs/howto/works_with.md says what the tests of every host assert."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from tests.unet_adapters import test_every_host as every_host
from tests.unet_adapters import test_order_on_every_host as order
from tests.unet_adapters import test_transformer_generation as generation
from tests.unet_adapters.host_models import MODELS, make_model
from tests.unet_adapters.transformer_pipelines import PIPELINES
from unet_adapters import find_host, find_sites, hosts
from unet_adapters.hosts.base import UNSUPPORTED, hosts_from

ROOT = Path(__file__).parents[2]
WORKS_WITH = ROOT / "docs" / "howto" / "works_with.md"
MOUNT = ROOT / "docs" / "howto" / "mount_a_mixer.md"

COLUMNS = {
    "UNet, ControlNet, `UNetMotionModel`": ("UNet",),
    "PixArt-α/Σ": ("PixArt", "PixArt-1024"),
    "SD3, SD3.5 large": ("SD3", "SD3.5 large"),
    "SD3.5 medium": ("SD3.5 medium",),
    "Flux": ("Flux", "Flux guidance"),
    "HunyuanDiT": ("HunyuanDiT",),
}

NAMES = {"unet": "UNet", "pixart": "PixArt", "sd3": "Stable Diffusion 3", "flux": "Flux", "hunyuan_dit": "HunyuanDiT"}
"""What pages call the hosts."""


def always(kind: str) -> bool:
    return True


def attends_to_text(kind: str) -> bool:
    return any(site.text for site in find_sites(make_model(kind)))


def can_be_offloaded(kind: str) -> bool:
    return all((kind, offloading) not in every_host.NOT_OFFLOADED for offloading in every_host.OFFLOADING)


# Every row: the test, which runs for every kind of host unless it takes none, and for which kinds it asserts a yes.
ROWS: dict[str, tuple[Callable[..., Any] | None, Callable[[str], bool]]] = {
    "`softmax` mixer equals": (every_host.test_softmax_is_the_stock_model_in_both_streams, always),
    "every mixer:": (every_host.test_every_mixer_mounts_trains_and_leaves_or_is_refused, always),
    '`text="softmax"`': (every_host.test_every_text_mode_runs_where_there_is_text, attends_to_text),
    "LoRA before and after": (order.test_lora_before_and_after_mounting_is_the_same, always),
    "size of the image": (every_host.test_two_sizes_before_one_backward_under_gradient_checkpointing, always),
    "masks that hide": (
        every_host.test_a_layer_treats_a_mask_as_the_stock_layer_does,
        lambda kind: kind not in every_host.MASKS_IGNORED,
    ),
    "`min_tokens`": (every_host.test_min_tokens_and_fused_projections, always),
    "fused projections": (
        every_host.test_min_tokens_and_fused_projections,
        lambda kind: kind not in every_host.NOT_FUSED,
    ),
    "model, sequential and group": (every_host.test_offloading_changes_nothing, can_be_offloaded),
    "`torch.compile` of": (every_host.test_a_compiled_block_computes_the_same, always),
    "adapters and mounted models:": (every_host.test_adapters_and_mounted_models_are_saved, always),
    "any order of": (order.test_the_order_of_operations_does_not_matter, always),
    "as a teacher:": (None, lambda kind: kind == "UNet" or kind in PIPELINES),
    "`mixlab plan`": (None, lambda kind: kind == "UNet" or kind in generation.BASE_SIZES),
}


def read_table() -> tuple[list[str], dict[str, list[str]]]:
    """The headers of the columns, and the cells of every row by its label."""
    section = WORKS_WITH.read_text().partition("### By host")[2]
    lines = list(takewhile(bool, section[section.index("\n| |") + 1 :].splitlines()))
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return header[1:], {label: cells for label, *cells in rows}


def test_the_columns_are_all_hosts() -> None:
    headers, _ = read_table()
    assert headers == list(COLUMNS)
    assert sorted(kind for kinds in COLUMNS.values() for kind in kinds) == sorted(MODELS)
    tested = {find_host(make_model(kind)).name for kind in MODELS}
    modules = pkgutil.walk_packages(hosts.__path__, f"{hosts.__name__}.")
    assert tested == {name for module in modules for name in hosts_from(module.name)} == set(NAMES)


@pytest.mark.parametrize("start", ROWS)
def test_a_row_says_what_its_test_asserts(start: str) -> None:
    headers, rows = read_table()
    (label,) = [label for label in rows if label.startswith(start)]
    test, holds = ROWS[start]
    if test is not None:
        function = test.hypothesis.inner_test if hasattr(test, "hypothesis") else test
        assert {"model", "kind"} & set(inspect.signature(function).parameters), f"{label}: not a test of every host"
    for header, cell in zip(headers, rows[label], strict=True):
        if cell.startswith("as "):  # another column's: the same class, with other options
            assert cell.removeprefix("as ") in headers
            assert rows[label][headers.index(cell.removeprefix("as "))].startswith("yes")
        else:
            expected = any(holds(kind) for kind in COLUMNS[header])
            assert cell.startswith("yes") == expected, f"{label}, {header}: {cell}"


def test_no_row_is_without_a_test() -> None:
    _, rows = read_table()
    assert len(rows) == len(ROWS)


@pytest.mark.parametrize("page", [ROOT / "README.md", MOUNT], ids=lambda page: page.name)
def test_pages_name_the_hosts(page: Path) -> None:
    text = page.read_text()
    assert [name for name in NAMES.values() if name not in text] == []


def test_pages_name_the_architectures_that_are_refused() -> None:
    for page in (WORKS_WITH, MOUNT):
        text = page.read_text().replace(" ", "").replace("-", "")
        for name in UNSUPPORTED:
            assert name.removesuffix("2DModel").removesuffix("Transformer") in text, f"{page.name}: {name}"
