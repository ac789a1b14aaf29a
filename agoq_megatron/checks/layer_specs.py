"""Refuses a layer spec that asks for other layers than Megatron's own, whose place ours take."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from agoq_megatron.seams.refusals import UsageError

_NOTHING = (None, IdentityOp)
_MASKS = (AttnMaskType.causal, AttnMaskType.padding_causal)


def check_layer_spec(spec, config) -> None:
    """Refuse what a spec says and the layers here would not do.

    Args:
        spec: as ``GPTModel`` takes it: of a layer, of a block, or of the layers of one.
        config: Megatron's transformer config, which says the rest.

    Raises:
        UsageError: it does.
    """
    for layer in _layers(spec):
        module = _of(layer, "module")
        if module.__module__.startswith("agoq_megatron."):
            continue
        if module is not TransformerLayer:
            raise _unknown("layers", module)
        parts = layer.submodules
        if parts.cross_attention not in _NOTHING:
            raise _unknown("cross-attention", parts.cross_attention)
        _check_attention(parts.self_attention, config)
        _check_mlp(parts.mlp)


def _unknown(what: str, found) -> UsageError:
    name = getattr(found, "__name__", None) or getattr(_of(found, "module"), "__name__", str(found))
    return UsageError(
        f"the layer spec's {what} are of {name}, which is not known here. Known are those of "
        "get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec and get_gpt_decoder_block_spec."
    )


def _of(spec, name: str):
    return getattr(spec, name, spec)


def _layers(spec) -> Iterator[ModuleSpec]:
    if (
        isinstance(spec, ModuleSpec)
        and isinstance(spec.module, type)
        and issubclass(spec.module, TransformerBlock)
    ):
        spec = spec.submodules
    if isinstance(spec, TransformerBlockSubmodules):
        seen = []
        for layer in spec.layer_specs or ():
            if not any(layer is it for it in seen):
                seen.append(layer)
        yield from seen
    elif isinstance(spec, ModuleSpec):
        yield spec
    else:
        raise _unknown("layers", type(spec))


def _check_attention(attention, config) -> None:
    module = _of(attention, "module")
    latent = module is MLASelfAttention
    if module is not SelfAttention and not latent:
        raise _unknown("attention", module)
    if latent != config.multi_latent_attention:
        raise UsageError(
            f"the layer spec has {module.__name__}, and the config has multi_latent_attention="
            f"{config.multi_latent_attention}: they must agree."
        )
    mask = (attention.params or {}).get("attn_mask_type", AttnMaskType.causal)
    if mask not in _MASKS:
        raise UsageError(f"the layer spec's attention has the mask {mask.name}; the layers here are causal.")
    parts = attention.submodules
    norm = parts.kv_layernorm if latent else parts.q_layernorm
    if latent and norm in _NOTHING and "LayerNorm" in getattr(parts.linear_kv_up_proj, "__name__", ""):
        norm = parts.linear_kv_up_proj  # Transformer Engine's, norm and product in one
    asked = "l2" if norm is L2Norm else None if norm in _NOTHING else "norm"
    meant = "l2" if config.qk_l2_norm else "norm" if config.qk_layernorm else None
    if asked != meant:
        what = "no norms" if asked is None else getattr(norm, "__name__", "norms")
        raise UsageError(
            f"the layer spec has {what} of queries and keys, and the config has qk_layernorm="
            f"{config.qk_layernorm}, qk_l2_norm={config.qk_l2_norm}: they must agree."
        )


def _check_mlp(mlp) -> None:
    made_by = mlp
    if isinstance(made_by, functools.partial):
        made_by = made_by.func
    owner = getattr(made_by, "__self__", None) or _of(made_by, "module")
    if owner is not MLP:
        raise _unknown("MLPs", owner)
