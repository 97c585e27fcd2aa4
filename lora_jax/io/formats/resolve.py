"""Which of a model's modules an adapter's name means: wrapped models, parts of pipelines, kohya's flat names."""

import re
from collections.abc import Collection

from lora_jax.errors import CheckpointError

_WRAPPERS = frozenset((
    # What PEFT, torch.compile, DataParallel and models with a head put around a model.
    "base_model", "model", "_orig_mod", "module", "_fsdp_wrapped_module", "_forward_module",
    # The parts of a diffusers pipeline, and what ComfyUI calls the denoiser.
    "transformer", "transformer_2", "unet", "diffusion_model", "text_encoder", "text_encoder_2", "text_encoder_3",
    "text_encoders", "clip_l", "clip_g", "t5xxl",
))  # fmt: skip
_FLAT = re.compile(r"(?:lora|lycoris)_(?:(?:unet|prior_unet|te[123]?|text_encoder|transformer)_)?(?P<rest>[^.]+)")


def is_flat(name: str) -> bool:
    """Whether a name is one of kohya's, with `_` for every dot.

    >>> is_flat("lora_unet_mid_block_attentions_0_to_q"), is_flat("mid_block.attentions.0.to_q")
    (True, False)
    """
    return _FLAT.fullmatch(name) is not None


def resolve(where: str, names: Collection[str], known: Collection[str]) -> dict[str, str]:
    """The module of a model that each name means; names that are modules, or mean none, are left out.

    Wrappers around the model (`base_model.model.`, `_orig_mod.`, `module.`, `model.`, `unet.`, ...) may be missing on
    either side, in any combination. kohya's flat names are looked up among the flattened names of the modules.

    Args:
      where: the file, for error messages.
      names: modules of an adapter.
      known: modules of the model.

    Raises:
      CheckpointError: a name means several modules, or several names mean one.

    Example:
      >>> resolve("x", ["module.h.0.up", "lora_unet_h_1_up"], ["model.h.0.up", "h.1.up"])
      {'module.h.0.up': 'model.h.0.up', 'lora_unet_h_1_up': 'h.1.up'}
    """
    by_core: dict[str, set[str]] = {}
    by_flat: dict[str, set[str]] = {}
    for module in known:
        core = _core(module)
        by_core.setdefault(core, set()).add(module)
        for each in {core, module}:
            by_flat.setdefault(each.replace(".", "_"), set()).add(module)
    found: dict[str, str] = {}
    taken = {name: name for name in names if name in known}
    for name in names:
        if name in taken:
            continue
        flat = _FLAT.fullmatch(name)
        readings = sorted(by_core.get(_core(name), ()) if flat is None else by_flat.get(flat["rest"], ()))
        if len(readings) > 1:
            raise CheckpointError(f"{where}: {name} may be {' or '.join(readings)} of the model. Rename its keys.")
        if readings:
            if (other := taken.get(readings[0])) is not None:
                raise CheckpointError(
                    f"{where}: {other} and {name} both mean {readings[0]} of the model: the file is for several parts "
                    "of a pipeline, or holds several adapters. Keep the keys of one."
                )
            found[name], taken[readings[0]] = readings[0], name
    return found


def _core(name: str) -> str:
    """The name without the wrappers around the model; the last component always stays."""
    parts = name.split(".")
    start = next((index for index, part in enumerate(parts[:-1]) if part not in _WRAPPERS), len(parts) - 1)
    return ".".join(parts[start:])
