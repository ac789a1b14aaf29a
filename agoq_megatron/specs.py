"""The layers for ``--spec agoq_megatron.specs agoq_layer_spec``: the name that users type, for Megatron-LM's
own scripts. What it stands for is in ``entries/specs.py`` and ``entries/stock.py``."""

from __future__ import annotations

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from agoq_megatron.entries import specs
from agoq_megatron.entries.specs import AGoQSpecProvider, layer_spec, model_config_from_args
from agoq_megatron.entries.stock import prepare_stock

__all__ = ["AGoQSpecProvider", "agoq_layer_spec", "layer_spec", "model_config_from_args"]


def agoq_layer_spec(config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The decoder's layers on this pipeline stage, for ``GPTModelConfig.transformer_layer_spec``.

    Args:
        config: Megatron's ``GPTModelConfig``. Where its transformer config has a policy already, that is in
            force; else the run is stock Megatron's, and what is kept how comes from its environment.
        vp_stage: virtual pipeline stage, or None.

    Raises:
        SystemExit: in a stock run, flags that cannot work.
    """
    if getattr(config.transformer, "agoq", None) is None:
        prepare_stock(config)
    return specs.agoq_layer_spec(config, vp_stage)
