"""Megatron's own GPT, layers, loss and optimizer, as far from this project's as its wheel allows:
the reference of the tests. Only the batches come from here, and the facade that lets it run on a
CPU. (And the layers, if ``--spec`` says so: everything else then follows Megatron-LM's pretrain_gpt.py.)

With AGOQ_ENABLE, keywords of ``agoq_megatron.enable`` as JSON, it is called first.

Writes ``{"iteration": [loss, gradient norm]}`` to the file that STOCK_REPORT names.
"""

import json
import os
from functools import partial, wraps


def mixtures_named_as_by_transformer_engine(config, vp_stage=None):
    """Megatron's local layers. In checkpoints the norm before a mixture has the name that Transformer
    Engine's layers, and ours, give it: there it is not a part of FC1."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    block = get_gpt_decoder_block_spec(
        config.transformer, use_transformer_engine=False, normalization=config.transformer.normalization,
        qk_l2_norm=config.transformer.qk_l2_norm, vp_stage=vp_stage,
    )  # fmt: skip
    for layer in block.layer_specs:
        if layer.submodules.mlp.func.__name__ == "MoELayer":
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return block


def main():
    from agoq_megatron.seams import compat, cpu

    cpu.install()
    compat.skip_compiling_helpers()
    import megatron.training.training as loop
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from agoq_megatron.entries.data import datasets_provider, get_batch

    def flags(parser):
        parser.set_defaults(
            transformer_impl="local",
            apply_rope_fusion=False,
            gradient_accumulation_fusion=False,
            no_persist_layer_norm=True,
            **cpu.CPU_DEFAULTS,
        )
        return parser

    history = {}
    train_step = loop.train_step

    @wraps(train_step)
    def recording_train_step(*args, iteration, **kwargs):
        result = train_step(*args, iteration=iteration, **kwargs)
        if "lm loss" in result[0]:  # the last pipeline stage holds it
            history[iteration + 1] = [float(result[0]["lm loss"]), float(result[5])]
        return result

    loop.train_step = recording_train_step

    def mean_loss(mask, losses):
        total, count = (losses.float() * mask).sum(), mask.sum()
        return total, count.int(), {"lm loss": torch.stack((total.detach(), count))}

    def document_mask(packed):
        """True where a query does not see a key, [b, 1, s, s]."""
        s, bounds = packed.max_seqlen_q, packed.cu_seqlens_q
        its_document = torch.searchsorted(bounds, torch.arange(bounds[-1]), right=True).view(-1, 1, s)
        apart = its_document[:, :, :, None] != its_document[:, :, None, :]
        return apart | torch.ones(s, s, dtype=torch.bool).triu(1)

    def step(data_iterator, model):
        stage = get_attr_wrapped_model(model, "vp_stage")
        tokens, labels, mask, attention_mask, positions, packed = get_batch(data_iterator, stage)
        more = {}
        if packed is not None and args.spec:  # which layers of Megatron's own take for a GPU alone
            more["packed_seq_params"] = packed
        elif packed is not None:
            attention_mask = document_mask(packed)
        losses = model(tokens, positions, attention_mask, labels=labels, loss_mask=mask, **more)
        return losses, partial(mean_loss, mask)

    import torch

    args = parse_and_validate_args(flags)
    if "AGOQ_ENABLE" in os.environ:
        import agoq_megatron

        now = {"iteration": lambda: args.curr_iteration, "seed": args.seed}
        agoq_megatron.enable(**now | json.loads(os.environ["AGOQ_ENABLE"]))
    model = gpt_config_from_args(args)
    model.rope_scaling_factor = args.rope_scaling_factor  # which Megatron parses and leaves out
    if args.qk_l2_norm:  # of which it tells Transformer Engine's layers only
        model.transformer_layer_spec = get_gpt_layer_local_spec(
            normalization=args.normalization, qk_l2_norm=True
        )
    if args.num_experts and args.spec is None:
        model.transformer_layer_spec = mixtures_named_as_by_transformer_engine
    config = pretrain_cfg_container_from_args(args, model)
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, step)
    if args.rank == args.world_size - 1:
        with open(os.environ["STOCK_REPORT"], "w") as f:
            json.dump(history, f)


if __name__ == "__main__":
    main()
