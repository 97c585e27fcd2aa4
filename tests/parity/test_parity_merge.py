"""Checkpoints merged on disk load in transformers and compute what PEFT computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from helpers import assert_close

import lora_jax as lora

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 7], [3, 3, 0, 31, 8, 4]])
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **options)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(**options: Any) -> Any:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, **options)
    return transformers.GPT2LMHeadModel(config).eval()


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (lambda: llama(tie_word_embeddings=False), {"target_modules": LINEAR}),
    "dora": (lambda: llama(tie_word_embeddings=False), {"target_modules": LINEAR, "use_dora": True}),
    "head": (lambda: llama(tie_word_embeddings=False), {"target_modules": ["lm_head", "embed_tokens", "q_proj"]}),
    "rslora": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    # PEFT writes fan_in_fan_out=False, as its last layer is no Conv1D, and c_proj is square.
    "gpt2 with its head": (
        lambda: gpt2(tie_word_embeddings=False),
        {"target_modules": ["c_attn", "c_proj", "lm_head"]},
    ),
    "gpt2 with its head, DoRA": (
        lambda: gpt2(tie_word_embeddings=False),
        {"target_modules": ["c_attn", "c_proj", "lm_head"], "use_dora": True},
    ),
    "tokens": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 30]},
    ),
}


def trained(base: Any, options: dict[str, Any]) -> Any:
    """A PEFT model whose every trained number is random."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 1 + torch.rand(parameter.shape) if "magnitude" in name else torch.randn(parameter.shape) / 3
                parameter.copy_(scale)
    return model


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits.float().numpy()


@pytest.mark.parametrize("shards", ["1GB", "10KB"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_pefts(name: str, shards: str, tmp_path: Path) -> None:
    build, options = CASES[name]
    torch.manual_seed(len(name))
    base = build()
    base.save_pretrained(tmp_path / "base", max_shard_size=shards)
    model = trained(base, options)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lora.peft.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = logits(model)
    assert_close(logits(merged), adapted)
    unloaded = model.merge_and_unload()
    assert_close(logits(merged), logits(unloaded))
    state = unloaded.state_dict()
    assert_close(
        {key: value.numpy() for key, value in merged.state_dict().items()},
        {key: state[key].numpy() for key in merged.state_dict()},
    )


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (lambda: llama(tie_word_embeddings=True), ["embed_tokens"]),
        (lambda: llama(tie_word_embeddings=True), ["lm_head"]),
        (lambda: llama(tie_word_embeddings=True), ["embed_tokens", "lm_head", "q_proj"]),
        (gpt2, ["wte"]),
        (mamba, ["embeddings"]),
    ],
)
def test_untied_tables_give_the_logits_of_the_adapted_model(build: Any, targets: list[str], tmp_path: Path) -> None:
    """PEFT's own merge writes the sum into the one table, and computes something else."""
    torch.manual_seed(1)
    base = build()
    base.save_pretrained(tmp_path / "base")
    model = trained(base, {"target_modules": targets})
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lora.peft.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", untie=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = logits(model)
    assert_close(logits(merged), adapted)
    assert np.abs(logits(model.merge_and_unload()) - adapted).max() > 0.1


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    """PEFT's safe merge rounds the update before it adds it, so some of its weights are not the nearest ones."""
    torch.manual_seed(2)
    base = llama(tie_word_embeddings=False).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = trained(base, {"target_modules": LINEAR})
    model.save_pretrained(tmp_path / "adapter")
    lora.peft.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    files, ours = lora.peft.read_peft(tmp_path / "adapter"), merged.state_dict()
    stored = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).state_dict()
    safe, worse = model.merge_and_unload(safe_merge=True).state_dict(), 0
    for module in files.modules:
        weight = stored[f"{module}.weight"]
        exact = weight + torch.from_numpy(files.delta(module, tuple(weight.shape)))
        assert torch.equal(ours[f"{module}.weight"], exact.to(torch.bfloat16))
        worse += int((safe[f"{module}.weight"] != ours[f"{module}.weight"]).sum())
    assert worse > 0


def test_experts_that_transformers_renames(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    base = transformers.MixtralForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "original")
    base.save_pretrained(tmp_path / "held", save_original_format=False)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = trained(base, {"target_modules": ["q_proj"], "target_parameters": experts})
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(lora.CheckpointError, match="save_original_format=False"):
        lora.peft.merge_checkpoint(tmp_path / "original", tmp_path / "adapter", tmp_path / "merged")
    lora.peft.merge_checkpoint(tmp_path / "held", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(logits(merged), logits(model))
