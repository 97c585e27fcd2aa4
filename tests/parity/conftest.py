"""The lane against real PEFT: skipped where PyTorch, PEFT or transformers is missing."""

import warnings
from contextlib import suppress
from pathlib import Path

import pytest

# Their warnings are not ours, and some come at import, which is before any test's filter.
with warnings.catch_warnings(), suppress(ImportError):
    warnings.simplefilter("ignore")
    import peft  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

THEIRS = ("torch", "peft", "transformers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let their modules warn in this directory; what warns in ours stays an error."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for module in THEIRS:
                item.add_marker(pytest.mark.filterwarnings(rf"ignore:::{module}(\.|$)"))
