"""Options of the kernel benchmarks under pytest."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="smallest shape, float32 only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    keep = [item for item in items if "tiny-attn" in item.name and "float32" in item.name]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep
