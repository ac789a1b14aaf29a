"""Which layers each pipeline stage has."""

from __future__ import annotations

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


def layers_of(config, stage: int) -> list[list[int]]:
    """Numbers (from 1) of the layers in each model chunk of a stage; a chunk of a layout may have none. Those
    of multi-token prediction count on after the decoder's, in the last chunk of the last stage.

    Needs no process group. (Of a layout, ``--pipeline-model-parallel-layout``, Megatron's own two functions
    ignore the stage that they are asked about, and look at the process groups.)
    """
    chunks = config.virtual_pipeline_model_parallel_size
    found = []
    if config.pipeline_model_parallel_layout is not None:
        found = _of_layout(config.pipeline_model_parallel_layout.layout)[stage]
        chunks = 0
    for chunk in range(chunks) if chunks is not None else (None,):
        count = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage)
        offset = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=stage)
        found.append([offset + i + 1 for i in range(count)])
    if stage == config.pipeline_model_parallel_size - 1:
        found[-1] += predicting_layers(config)
    return found


def predicting_layers(config) -> list[int]:
    """Numbers of the layers of multi-token prediction (``--mtp-num-layers``)."""
    return list(range(config.num_layers + 1, config.num_layers + 1 + (config.mtp_num_layers or 0)))


def _of_layout(layout: list[list[list[LayerType]]]) -> list[list[list[int]]]:
    """Of ``[stage][chunk]`` with what it holds: numbered through the first chunks of all stages, then through
    the second ones."""
    found, last = [[[] for _ in chunks] for chunks in layout], 0
    for chunk in range(len(layout[0])):
        for stage, chunks in enumerate(layout):
            count = chunks[chunk].count(LayerType.decoder)
            found[stage][chunk] = list(range(last + 1, last + count + 1))
            last += count
    return found
