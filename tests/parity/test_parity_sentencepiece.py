"""A SentencePiece vocabulary in a GGUF file, as transformers reads the same file."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_jax.models.gguf import read_gguf
from lora_jax.models.gguf_tokenizer import read_tokenizer

TEXTS = [
    "", " ", "Hello, world!", "don't  stop\n\n\nhere ", "naïve café 東京 🙂‍↔️", "x=12345;y = 0.5", "\ttabs\r\nand more",
    "  two before", "def f(x):\n    return x ** 2\n", "A" * 300, "İ ﬁ é", "<s>[INST] hi [/INST]</s> and <0x0A> more",
]  # fmt: skip


def trained() -> list[tuple[str, float]]:
    """Pieces from the best one on, learned as SentencePiece's BPE learns them."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")  # type: ignore[misc]
    backend.decoder = decoders.Metaspace()  # type: ignore[misc]
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text() for name in ("argparse.py", "ast.py", "inspect.py", "textwrap.py")]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, show_progress=False))
    order = sorted(backend.get_vocab().items(), key=lambda each: each[1])
    singles = [piece for piece, _ in order if len(piece) == 1]
    merged = [piece for piece, _ in order if len(piece) > 1]
    return [(piece, -float(place)) for place, piece in enumerate([*merged, *singles])]


def written(path: Path) -> Path:
    """A file of the architecture llama with that vocabulary and hardly any weights."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(piece, score, 1) for piece, score in trained()]
    writer = GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64, "embedding_length": 8, "block_count": 1, "feed_forward_length": 8,
        "attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 4,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("llama")
    for add, place in ((writer.add_token_list, 0), (writer.add_token_scores, 1), (writer.add_token_types, 2)):
        add([piece[place] for piece in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {
        "token_embd": (len(pieces), 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
        **{f"blk.0.{name}": (8, 8) for name in
           ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")},
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tokens_and_texts_are_those_of_transformers(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = read_tokenizer(read_gguf(path).metadata)
    for text in TEXTS:
        for special in (False, True):
            tokens = ours.backend.encode(text, add_special_tokens=special).ids
            assert tokens == theirs.encode(text, add_special_tokens=special), text
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True), text
