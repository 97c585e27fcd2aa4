"""Training data: files of examples, the tokens that are trained on, packed rows, and batches by their step.

`read` reads a file or a directory, `encode` makes tokens of what it read, `show` prints one example with what is
trained on, and `Batches` gives the batch of a step. The extra `[text]` brings what they need.
"""

from typing import TYPE_CHECKING

from lora_jax import lazy as _lazy

if TYPE_CHECKING:  # What type checkers and editors see; a test holds it equal to the names below.
    from lora_jax.data.batches import Batches as Batches
    from lora_jax.data.counts import EncodeCounts as EncodeCounts
    from lora_jax.data.counts import ReadCounts as ReadCounts
    from lora_jax.data.encode import encode as encode
    from lora_jax.data.errors import DataError as DataError
    from lora_jax.data.example import Example as Example
    from lora_jax.data.example import Examples as Examples
    from lora_jax.data.example import Options as Options
    from lora_jax.data.example import Pair as Pair
    from lora_jax.data.pack import pack as pack
    from lora_jax.data.read import Dataset as Dataset
    from lora_jax.data.read import read as read
    from lora_jax.data.read import read_file as read_file
    from lora_jax.data.records import Record as Record
    from lora_jax.data.records import Records as Records
    from lora_jax.data.rows import Batch as Batch
    from lora_jax.data.rows import LabelBatch as LabelBatch
    from lora_jax.data.rows import PairBatch as PairBatch
    from lora_jax.data.show import marked as marked
    from lora_jax.data.show import show as show

_lazy.face(
    __name__,
    {
        "lora_jax.data.batches": "Batches",
        "lora_jax.data.counts": "EncodeCounts ReadCounts",
        "lora_jax.data.encode": "encode",
        "lora_jax.data.errors": "DataError",
        "lora_jax.data.example": "Example Examples Options Pair",
        "lora_jax.data.pack": "pack",
        "lora_jax.data.read": "Dataset read read_file",
        "lora_jax.data.records": "Record Records",
        "lora_jax.data.rows": "Batch LabelBatch PairBatch",
        "lora_jax.data.show": "marked show",
    },
)
