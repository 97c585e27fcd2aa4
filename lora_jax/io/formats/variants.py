"""Tensors that are no plain LoRA, or a layout of it that is not read, by their keys: refused by name."""

import re
from collections.abc import Iterable, Sequence

from lora_jax.errors import CheckpointError, listed

_ONLY_LORA = "Only low-rank factors of LoRA are read: train or export the adapter as LoRA"
_SAVE_AS_LORA = f"{_ONLY_LORA}; PEFT's save_as_lora, or an SVD of what it adds to the weights, makes one."

_VARIANTS: tuple[tuple[str, str, str], ...] = (
    (r"\.hada_[wt]\d", "LoHa (LyCORIS): Hadamard products of two low-rank matrices", _SAVE_AS_LORA),
    (r"\.lokr_[wt]\d", "LoKr (LyCORIS): Kronecker products", _SAVE_AS_LORA),
    (r"\.(oft_(blocks|diag|[rRs])|boft_[RsP])(\.|$)", "OFT: rotations of the weights, which add nothing low-rank",
     f"{_ONLY_LORA}, or merge it where it was made."),
    (r"\.(ia3_l|on_input)(\.|$)", "(IA)³, which scales activations", f"{_ONLY_LORA}."),
    (r"\.dora_scale$", "DoRA as LyCORIS stores it, whose axis of norms depends on the version that wrote it",
     "Merge it where it was made, or train with PEFT's use_dora."),
    (r"\.lora_mid\.", "LoCon with a Tucker core (lora_mid), a product of three factors",
     "Train without it (use_tucker=False, or use_cp=False), or merge it where it was made."),
    (r"\.reshape_weight$", "a LoRA that changes the shapes of the base's weights", "Merge it where it was made."),
    (r"\.lora_[ab]\.weight$", "torchtune's factors, with names and a rotary layout of its own",
     "torchtune writes the same adapter for PEFT beside it: adapter_model.safetensors and adapter_config.json."),
    (r"\.processor\.(qkv|proj)_lora\d\.", "XLabs' factors for Flux, which are those of parts of fused layers",
     "Convert it with diffusers: load_lora_weights, then save_lora_weights."),
    (r"(^|\.)(vblora_(logits|vector_bank)|randlora_\w+|fourierft_spectrum|waveft_spectrum|hra_u|shira_weight|c3a_kernel|"
     r"miss_block|bone_block|road_(theta|alpha))(\.|$)", "another method of PEFT than LoRA", _SAVE_AS_LORA),
    (r"^(prompt_embeddings|emb_params|string_to_param)(\.|$)", "trained prompts, which change no weight",
     f"{_ONLY_LORA}."),
)  # fmt: skip

_BARE: tuple[tuple[str, str, str], ...] = (
    (r"\.[ab][12]\.weight$", "GLora (LyCORIS)", _SAVE_AS_LORA),
    (r"\.(linear_in|linear_out)\.weight$", "NeMo's or Megatron's factors, whose layers are fused in their own way",
     "Export the adapter from NeMo in Hugging Face's format."),
    (r"\.([wb]_norm|diff|diff_b|set_weight)$", "whole differences of weights (ComfyUI, LyCORIS)",
     "Merge it where it was made, or make factors of them: lora-jax extract BASE TUNED OUT."),
)  # fmt: skip
"""Endings that modules of a model may have too: a config that asks for those modules decides."""

_FACTORS = re.compile(r"lora|vera_|trainable_tokens_delta|modules_to_save")


def check_keys(where: str, keys: Iterable[str], *, configured: bool) -> None:
    """Refuse what the keys show to be another method, another tool's layout, or a whole model.

    Args:
      where: the file, for error messages.
      keys: names of all tensors.
      configured: whether a config says what they are.

    Raises:
      CheckpointError: they are; it names the kind, some keys, and what to do next.

    Example:
      >>> try:
      ...     check_keys("x.safetensors", ["q.hada_w1_a"], configured=False)
      ... except CheckpointError as error:
      ...     print(str(error)[:66])
      x.safetensors holds LoHa (LyCORIS): Hadamard products of two low-r
    """
    names = sorted(keys)
    for pattern, what, advice in _VARIANTS if configured else (*_VARIANTS, *_BARE):
        if found := [name for name in names if re.search(pattern, name)]:
            raise CheckpointError(f"{where} holds {what}: {listed(found, count=3)}. {advice}")
    if names and not configured and not any(_FACTORS.search(name) for name in names):
        raise CheckpointError(_whole_model(where, names))


def _whole_model(where: str, names: Sequence[str]) -> str:
    return (
        f"{where} holds no factors but {listed(names, count=3)}: it is a model or a part of one, and no adapter. If it "
        "is fine-tuned, lora-jax extract BASE TUNED OUT makes an adapter of what it differs by; if modules_to_save "
        "wrote it, keep its adapter_config.json beside it."
    )
