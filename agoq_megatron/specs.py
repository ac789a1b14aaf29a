"""The layers for ``--spec agoq_megatron.specs agoq_layer_spec``: the name that users type. What it stands for
is in ``entries/specs.py``."""

from agoq_megatron.entries.specs import (
    AGoQSpecProvider,
    agoq_layer_spec,
    layer_spec,
    model_config_from_args,
)

__all__ = ["AGoQSpecProvider", "agoq_layer_spec", "layer_spec", "model_config_from_args"]
