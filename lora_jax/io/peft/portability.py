"""Which programs read a PEFT adapter as PEFT does, which misread it, and which refuse it; as of November 2026.

What is known of each is in docs/portability.md, with where it was read and what could not be verified.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from lora_jax.io.formats.mlx_lm import is_mlx_config
from lora_jax.io.peft.config import CONFIG
from lora_jax.io.peft.files import PeftFiles
from lora_jax.io.peft.keys import WEIGHTS
from lora_jax.io.peft.read import read_peft
from lora_jax.io.peft.servers import FEATURES, KNOWN, SERVERS, VLLM_RANKS, Server, Verdict
from lora_jax.jsonfile import read_object
from lora_jax.report.report import Report
from lora_jax.report.tables import Table


@dataclass(frozen=True)
class Row:
    """What one program does with an adapter.

    Attributes:
      server: the program.
      verdict: the worst of what follows: `reads`, `misreads` (it runs, with other numbers), or `refuses`.
      reasons: why, or what has to be set there.
    """

    server: Server
    verdict: Verdict
    reasons: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Portability(Report):
    """Who reads an adapter: a table when printed, and rows as attributes.

    Attributes:
      rows: a `Row` for every program.

    Example:
      >>> found = Portability((Row("vllm", "refuses", ("q: it has no DoRA",)),))
      >>> found.table().rows, found.as_dict()["rows"][0]["verdict"]
      ([('vllm', 'refuses', 'q: it has no DoRA')], 'refuses')
    """

    rows: tuple[Row, ...]

    def table(self) -> Table:
        """A row for every program."""
        cells = [(row.server, row.verdict, "; ".join(row.reasons)) for row in self.rows]
        return Table(("for", "verdict", "why"), cells, words=(0, 1, 2))


def portability(path: str | PathLike[str], subfolder: str | None = None) -> Portability:
    """Tell which programs read a PEFT adapter on disk as PEFT does.

    Args:
      path: as for `read_peft`.
      subfolder: likewise.

    Raises:
      CheckpointError: there is no adapter that can be read.

    Example:
      >>> import numpy as np, tempfile
      >>> from lora_jax.io.peft import Module, PeftFiles, write_peft
      >>> ones = Module("linear", np.ones((2, 4), np.float32), np.ones((3, 2), np.float32))
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> config = {"r": 2, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q"]}
      >>> write_peft(folder, PeftFiles(config, {"q": ones}))
      >>> {row.server: row.verdict for row in portability(folder).rows}
      {'vllm': 'reads', 'sglang': 'misreads', 'llama.cpp': 'misreads', 'mlx': 'refuses', 'peft': 'reads'}
    """
    files = read_peft(path, subfolder)
    folder = Path(path).expanduser() / (subfolder or "")
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return Portability(tuple(row(files, server) for server in SERVERS))
    ours = is_mlx_config(str(folder), read_object(folder / CONFIG)) if folder.is_dir() else False
    told = ("these are not the files that it reads, which lora-jax export writes",)
    return Portability(tuple(Row(each, *_READS if ours and each == "mlx" else ("refuses", told)) for each in SERVERS))


_READS: tuple[Verdict, tuple[str, ...]] = ("reads", ())


def row(files: PeftFiles, server: Server, *, form: bool = True) -> Row:
    """What one program does with an adapter.

    Args:
      files: the adapter.
      server: the program.
      form: whether its files are PEFT's, which mlx-lm does not read whatever they hold.
    """
    verdicts: list[Verdict] = ["reads"]
    reasons = _settings(files, server)
    if form and server == "mlx":
        verdicts.append("refuses")
        reasons.append("it has files of its own, which lora-jax export --for mlx writes")
    for feature, holds in FEATURES.items():
        example, said = holds(files), KNOWN[feature].get(server)
        if example is not None and said is not None:
            verdicts.append(said[0])
            reasons.append(f"{example}: {said[1]}" if example else said[1])
    order = ("reads", "misreads", "refuses")
    return Row(server, max(verdicts, key=order.index), tuple(reasons))


def _settings(files: PeftFiles, server: Server) -> list[str]:
    """What has to be set in a program that otherwise reads the adapter."""
    rank = max((files.rank(name) for name, module in files.modules.items() if module.kind != "parameter"), default=0)
    needed = next((each for each in VLLM_RANKS if each >= rank), None)
    if server != "vllm" or rank <= 16 or needed is None:
        return []
    return [f"rank {rank} needs --max-lora-rank {needed}"]
