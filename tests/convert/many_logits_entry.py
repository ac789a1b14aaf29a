"""Builds models in one process from from_hf's outputs and writes their logits, instead of training.

Reads from the file that LOGITS_TOKENS names {folder of a checkpoint: tokens [b, s]}, writes {folder: logits
[b, s, v]} to LOGITS_OUTPUT's. The flags are those that from_hf printed, the weights those that it wrote.
"""

import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace


def main():
    from agoq_megatron.seams import compat, cpu

    cpu.install()
    compat.silence_missing_accelerators()
    import torch
    from megatron.core import parallel_state, tensor_parallel

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    jobs = torch.load(os.environ["LOGITS_TOKENS"])
    torch.save({folder: logits(Path(folder), jobs[folder]) for folder in jobs}, os.environ["LOGITS_OUTPUT"])


def logits(checkpoint, tokens):
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    from agoq_megatron.checks.flag_register import REFUSED
    from agoq_megatron.convert.loading import weights_of_checkpoint
    from agoq_megatron.convert.megatron_store import CheckpointReader
    from agoq_megatron.model.transformer_config import AGoQTransformerConfig
    from agoq_megatron.policy.policy import load_policy
    from agoq_megatron.specs import agoq_layer_spec

    flags = shlex.split((checkpoint / "megatron_flags.txt").read_text())
    length = tokens.shape[1]
    sys.argv[1:] = [*flags, "--seq-length", str(length), "--micro-batch-size", "1", "--train-iters", "1"]
    sys.argv += "--lr 0 --transformer-impl local --no-persist-layer-norm --no-rope-fusion".split()
    sys.argv += "--no-gradient-accumulation-fusion --no-bias-swiglu-fusion --no-masked-softmax-fusion".split()
    args = parse_args()
    validate_args(args)
    config = core_transformer_config_from_args(args, AGoQTransformerConfig)
    config.agoq = load_policy("off")
    # Megatron's local layers stand in where the register refuses norms on query and key.
    ours = not args.qk_layernorm or "--qk-layernorm" not in [flag for _, _, flag, _ in REFUSED]
    if ours:
        spec = agoq_layer_spec(SimpleNamespace(transformer=config))
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    weights = weights_of_checkpoint(checkpoint)
    model = GPTModel(
        config, spec, vocab_size=weights.model.vocabulary, max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type, rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base, rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )  # fmt: skip
    stored = CheckpointReader(checkpoint / "release").names()
    kinds = (ShardedTensor, ShardedTensorFactory)
    due = {part.key for part in nested(model.sharded_state_dict()) if isinstance(part, kinds)}
    assert stored == due, f"{checkpoint} has {stored - due} and lacks {due - stored}"
    if not ours:
        rename(model)
    weights.fill(model)
    print(f"{checkpoint}: {'our' if ours else 'local'} layers", flush=True)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(tokens, torch.arange(length).expand_as(tokens), mask).float()


def nested(value):
    """The leaves of a tree of dictionaries."""
    return [leaf for one in value.values() for leaf in nested(one)] if isinstance(value, dict) else [value]


def rename(model):
    """Names of Megatron's local layers -> those of its checkpoints and of ours."""
    named = dict(model.named_parameters())
    names = {
        name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_").replace(
            ".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"
        ): parameter
        for name, parameter in named.items()
    }
    model.named_parameters = names.items


if __name__ == "__main__":
    main()
