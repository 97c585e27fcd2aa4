"""What tests of files share."""

from pathlib import Path

import pytest
from merging import factors, state, write_adapter, write_base


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A base of two layers and a norm, and an adapter on one of them."""
    base = write_base(tmp_path / "base", state(("q.weight", (6, 4)), ("k.weight", (5, 4)), ("norm.weight", (4,))))
    return base, write_adapter(tmp_path / "lora", {"q": factors(6, 4)})
