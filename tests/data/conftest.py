"""Fixtures of the data tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from raw_data import Raw, small_raw, write_raw

from ccf_llm_hf.data import PrepareConfig, get_asset


@pytest.fixture
def prepared_config(tmp_path: Path) -> Callable[..., PrepareConfig]:
    """Write a raw data set (default: the small one, as CSV) and configure its preparation."""

    def make(raw: Raw | None = None, kind: str = "csv", **options: object) -> PrepareConfig:
        given = write_raw(raw or small_raw(), kind, tmp_path / "raw")
        return PrepareConfig(**{"out": str(tmp_path / "out"), **given, **options})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def ml_1m_folder() -> Path:
    """The real MovieLens-1M files, from the cache or the network."""
    return get_asset("ml-1m")
