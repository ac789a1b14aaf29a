"""Trains Megatron's local mixtures of experts and ours from the same weights; prints the differences as JSON.

Run as a script (the tests do): the CPU facade changes a process for good.
"""

import json
import os
import sys
import tempfile
import types

import torch
import torch.nn.functional as F
from compare_with_megatron import (
    DEEPSEEK,
    QUICK,
    YARN_OF_LATENTS,
    ZERO_CENTRED,
    LatentDotProduct,
    LatentSelfAttention,
    our_name,
    relative,
)
from megatron.core import parallel_state, tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from agoq_megatron.model.transformer_config import AGoQLatentConfig, AGoQTransformerConfig
from agoq_megatron.planning.parameters import parameters
from agoq_megatron.policy.policy import load_policy
from agoq_megatron.specs import agoq_layer_spec

EXPERTS, VOCABULARY, SEQUENCE, LAYERS = 6, 173, 37, 2
LATENTS = {
    name: value for name, value in DEEPSEEK.items() if name not in ("add_bias_linear", "normalization")
}
MODELS = {
    "mixtral": {
        "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.02, "moe_z_loss_coeff": 1e-3,
    },
    "all-gather, FP32 router": {
        "moe_token_dispatcher_type": "allgather", "moe_router_dtype": "fp32", "moe_router_pre_softmax": True,
    },
    "deepseek": {
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 3, "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 1.7,
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01,
        "moe_shared_expert_intermediate_size": 56, "moe_layer_freq": [0, 1], "moe_router_dtype": "fp32",
    },
    "gated shared experts, GELU": {
        "moe_shared_expert_intermediate_size": 40, "moe_shared_expert_gate": True, "gated_linear_unit": False,
        "activation_func": F.gelu, "normalization": "LayerNorm",
    },
    "dropped tokens": {"moe_expert_capacity_factor": 0.6, "use_cpu_initialization": True},
    "jitter": {"moe_input_jitter_eps": 0.1, "moe_router_dtype": "fp32"},
    "activation again": {
        "moe_grouped_gemm": True, "recompute_granularity": "selective", "recompute_modules": ["moe_act"],
    },
    "padded to capacity": {"moe_expert_capacity_factor": 0.8, "moe_pad_expert_input_to_capacity": True},
    "one expert has all": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
    "latents": LATENTS | {
        "num_query_groups": 6, "moe_router_pre_softmax": True, "moe_shared_expert_intermediate_size": 56,
    },
    "latents with q-LoRA, sigmoid": LATENTS | YARN_OF_LATENTS | {
        "num_query_groups": 6, "q_lora_rank": 40, "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True, "moe_router_num_groups": 3, "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 1.7, "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.01, "moe_shared_expert_intermediate_size": 56, "moe_layer_freq": [0, 1],
        "moe_router_dtype": "fp32",
    },
    "gpt-oss": QUICK | {
        "softmax_type": "learnable", "window_size": (7, 0), "window_attn_skip_freq": 2,
    },
    "squared ReLU, zero-centred norms": ZERO_CENTRED | {
        "gated_linear_unit": False, "activation_func": squared_relu, "moe_router_score_function": "sigmoid",
        "moe_shared_expert_intermediate_size": 40,
    },
}  # fmt: skip


def build(name: str, ours: bool):
    changes = {
        "num_attention_heads": 3, "num_query_groups": 1,
        "gated_linear_unit": True, "activation_func": F.silu, "normalization": "RMSNorm",
        "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none", **MODELS[name],
    }  # fmt: skip
    if not ours:  # torch's norms have no zero-centred weights: the same model with weights that are not
        changes["layernorm_zero_centered_gamma"] = False
    kind = AGoQLatentConfig if changes.get("multi_latent_attention") else AGoQTransformerConfig
    config = kind(
        num_layers=LAYERS, hidden_size=48, ffn_hidden_size=80,
        num_moe_experts=EXPERTS, moe_ffn_hidden_size=40, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False, **changes,
    )  # fmt: skip
    config.agoq = load_policy("off")
    if ours:
        spec = agoq_layer_spec(types.SimpleNamespace(transformer=config))
    else:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        for layer in spec.layer_specs if config.multi_latent_attention else ():
            layer.submodules.self_attention.module = LatentSelfAttention
            layer.submodules.self_attention.submodules.core_attention = LatentDotProduct
    return GPTModel(
        config, spec, vocab_size=VOCABULARY, max_sequence_length=SEQUENCE, position_embedding_type="rope",
        rotary_base=10, share_embeddings_and_output_weights=False,
    ).to("cuda")  # fmt: skip


def as_ours(tensors: dict, mixtures: set[str], latents: bool) -> dict:
    """Stock's parameters, or their gradients, under our names, experts joined."""
    found, stacks = {}, {}
    for name, tensor in tensors.items():
        if ".pre_mlp_layernorm." not in name or name.split(".pre_mlp")[0] not in mixtures:
            name = our_name(name, latents)
        if ".local_experts." in name:
            before, _, rest = name.partition("local_experts.")
            key = before + ("weight1" if "fc1" in rest else "weight2")
            stacks.setdefault(key, []).append(tensor)
        else:
            found[name] = tensor
    return found | {key: torch.stack(its) for key, its in stacks.items()}


def planned(config) -> int:
    """Parameters of the model as the planner counts them."""
    args = types.SimpleNamespace(
        padded_vocab_size=VOCABULARY, position_embedding_type="rope", max_position_embeddings=SEQUENCE,
        untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    return parameters(args, config, 0).total


def gradients_of(model) -> dict:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def error(a, b) -> float:
    return relative(a, b) if b.any() else a.norm().item()


def zero_centred(weights: dict) -> dict:
    """Ones of norms as zeros."""
    return {n: p - 1 if n.endswith(("norm_weight", "norm.weight")) else p for n, p in weights.items()}


def compare(name: str, seed: int, steps: int) -> dict:
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    stock = build(name, ours=False)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    ours = build(name, ours=True)
    mixtures = {n.rpartition(".mlp.router")[0] for n, _ in ours.named_modules() if n.endswith(".mlp.router")}
    latents = ours.config.multi_latent_attention
    centred = zero_centred if ours.config.layernorm_zero_centered_gamma else dict
    initial = centred(as_ours(dict(stock.named_parameters()), mixtures, latents))
    same = all(torch.equal(p, initial[n]) for n, p in ours.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in stock.named_parameters():
            if p.dim() == 1:  # norms away from one: mistakes there must show
                p += 0.1 * torch.randn(p.shape, generator=generator).to(p.device)
            if name == "one expert has all" and "router.weight" in n:
                p[1:] = 0  # the first has all tokens or none: half of them
                p[0] *= 50
    found = {n: p.detach().clone() for n, p in stock.named_parameters()}
    weights = centred(as_ours(found, mixtures, latents))
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all("_extra_state" in n or "expert_bias" in n for n in missing), missing

    silent = {n for n, module in ours.named_modules() if [*module.parameters(recurse=False)]}
    for n in silent.copy():
        ours.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: silent.discard(n))

    models = {"stock": stock, "ours": ours}
    # As Megatron, without decay of vectors: zero-centred, they would decay to another value.
    optimizers = {
        k: torch.optim.AdamW(
            [
                {"params": [p for p in m.parameters() if p.dim() > 1]},
                {"params": [p for p in m.parameters() if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=1e-3,
            eps=1e-6,
        )
        for k, m in models.items()
    }
    losses, gradients = {k: [] for k in models}, {}
    positions = torch.arange(SEQUENCE, device="cuda").expand(2, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool, device="cuda").triu(1)[None, None]
    for step in range(steps):
        tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=generator).to("cuda")
        for k, model in models.items():
            torch.manual_seed(seed + step)  # the same jitter
            loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
            optimizers[k].zero_grad()
            loss.backward()
            losses[k].append(loss.item())
            if step == 0:
                gradients[k] = gradients_of(model)
            optimizers[k].step()
    reference = as_ours(gradients["stock"], mixtures, latents)
    assert reference.keys() == gradients["ours"].keys()
    return {
        "gradient_errors": {n: error(gradients["ours"][n], g) for n, g in reference.items()},
        "loss_error": max(abs(a - b) / b for a, b in zip(losses["ours"], losses["stock"], strict=True)),
        "losses": losses["ours"],
        "silent": sorted(silent),
        "same_start": same,
        "parameters": [sum(p.numel() for p in ours.parameters()), planned(ours.config)],
    }


def main() -> None:
    seed, steps = map(int, sys.argv[1:3])
    os.environ.setdefault("RANK", "0")
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        with torch.compiler.set_stance("force_eager"):
            results = {name: compare(name, seed, steps) for name in sys.argv[3:] or MODELS}
        torch.distributed.destroy_process_group()
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
