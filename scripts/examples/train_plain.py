"""A small GPT trained with megatron.core alone (model, DDP, optimizer, own loop), all parts of AGoQ in it.

torchrun --nproc-per-node 2 scripts/examples/train_plain.py [STEPS]
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import distributed, parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

import agoq_megatron

STEPS, S, VOCABULARY = int((sys.argv[1:] or ["20"])[0]), 64, 128


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16}
    config = TransformerConfig(
        num_layers=2, hidden_size=128, ffn_hidden_size=256, num_attention_heads=4, num_query_groups=2,
        gated_linear_unit=True, activation_func=F.silu, normalization="RMSNorm", add_bias_linear=False,
        attention_dropout=0.0, hidden_dropout=0.0, **bf16,
    )  # fmt: skip
    with agoq_megatron.enable(activations="agoq", grad_bits=8, optimizer_bits=8) as agoq:
        model = GPTModel(
            config, get_gpt_layer_local_spec(), VOCABULARY, S, position_embedding_type="rope"
        ).cuda()
        ddp = distributed.DistributedDataParallelConfig(use_distributed_optimizer=True)
        model = distributed.DistributedDataParallel(config, ddp, Float16Module(config, model))
        adam = OptimizerConfig(optimizer="adam", lr=3e-3, use_distributed_optimizer=True, **bf16)
        optimizer = get_megatron_optimizer(adam, [model], use_gloo_process_groups=False)
        positions = torch.arange(S, device="cuda").expand(4, -1)
        data = torch.Generator().manual_seed(dist.get_rank())
        for n in range(STEPS):
            agoq.step(n)
            model.zero_grad_buffer()
            start = torch.randint(VOCABULARY, (4, 1), generator=data)
            tokens = ((start + 3 * torch.arange(S + 1)) % VOCABULARY).cuda()
            loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()).mean()
            loss.backward()
            distributed.finalize_model_grads([model])
            optimizer.step()
            print(f"rank {dist.get_rank()} step {n} loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
