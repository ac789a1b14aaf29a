"""A small GPT by megatron.core alone, its DDP, its optimizer and a loop, to try ``enable`` on."""

from __future__ import annotations

import torch

STEPS, VOCABULARY, SEQUENCE = 3, 97, 16


def config_of(**changes):
    import torch.nn.functional as F
    from megatron.core.transformer.transformer_config import TransformerConfig

    own = dict(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=2, kv_channels=64,
        hidden_dropout=0.0, attention_dropout=0.0, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, normalization="RMSNorm", bf16=True, params_dtype=torch.bfloat16,
    )  # fmt: skip
    return TransformerConfig(**own | changes)


def local_spec(config=None):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(normalization="RMSNorm")


def gpt(config, spec, seed: int, **more):
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel

    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    more = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False} | more
    return GPTModel(config, spec, VOCABULARY, SEQUENCE, **more)


def wrapped(model, config, **ddp):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    ddp = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "bucket_size": 40_000} | ddp
    return DistributedDataParallel(config, DistributedDataParallelConfig(**ddp), Float16Module(config, model))


def optimizer_for(model, **changes):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    own = dict(
        optimizer="adam", lr=1e-2, bf16=True, use_distributed_optimizer=True, params_dtype=torch.bfloat16
    )
    return get_megatron_optimizer(OptimizerConfig(**own | changes), [model], use_gloo_process_groups=False)


def parts(model, optimizer, seed: int, begin):
    """Trains; stops after each micro-batch and each step, and yields its loss."""
    data, positions = torch.Generator().manual_seed(seed), torch.arange(SEQUENCE)[None]
    for n in range(STEPS):
        begin(n)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        for last in (False, True):
            tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=data)
            model.is_last_microbatch = last
            losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
            if last:
                losses.float().mean().backward()
            else:
                with model.no_sync():
                    losses.float().mean().backward()
            yield losses.sum().item()
        model.finish_grad_sync()
        optimizer.step()


def trained(model, optimizer, seed: int, begin) -> list:
    losses = list(parts(model, optimizer, seed, begin))
    return [*losses, *(p.detach().float().sum().item() for p in model.parameters())]
