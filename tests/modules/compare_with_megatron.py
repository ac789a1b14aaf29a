"""Trains Megatron's local layers and ours from the same weights; prints the differences as JSON.

Run as a script (the tests do): the CPU facade changes a process for good.
"""

import json
import os
import sys
import tempfile
import types

import torch

if not torch.cuda.is_available():
    from agoq_megatron.seams import cpu

    cpu.install()

import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.activations import squared_relu  # noqa: E402
from megatron.core.fusions.fused_bias_geglu import quick_gelu  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.multi_latent_attention import MLASelfAttention  # noqa: E402
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper  # noqa: E402

from agoq_megatron.entries.specs import agoq_layer_spec, predicting_spec  # noqa: E402
from agoq_megatron.model.transformer_config import AGoQLatentConfig, AGoQTransformerConfig  # noqa: E402
from agoq_megatron.planning.parameters import parameters  # noqa: E402
from agoq_megatron.policy.policy import load_policy  # noqa: E402

LLAMA = dict(
    num_query_groups=2, gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
    normalization="RMSNorm",
)  # fmt: skip
GPT = dict(
    num_query_groups=6, gated_linear_unit=False, activation_func=F.gelu, add_bias_linear=True,
    normalization="LayerNorm",
)  # fmt: skip
QUICK = dict(
    gated_linear_unit=True, activation_func=quick_gelu, glu_linear_offset=1.0, activation_func_clamp_value=0.1
)  # fmt: skip
ZERO_CENTRED = dict(layernorm_zero_centered_gamma=True, qk_layernorm=True)
# Heads of 24 features in queries and keys and of 20 in values.
DEEPSEEK = LLAMA | dict(
    num_query_groups=6, multi_latent_attention=True, qk_layernorm=True, q_lora_rank=None, kv_lora_rank=48,
    qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=20, rope_type="rope", rotary_base=10,
)  # fmt: skip
YARN_OF_LATENTS = dict(
    rope_type="yarn", rotary_scaling_factor=4, original_max_position_embeddings=8, mscale=0.7,
    mscale_all_dim=0.3,
)  # fmt: skip
# The base of the rotation is small, and there are no biases before the norms of keys: what all keys share has
# no gradient but by the rotation, and sums that cancel are not precise in FP32.
ARCHITECTURES = {
    "llama": (LLAMA, "rope"),
    "gpt": (GPT, "learned_absolute"),
    "qwen3": (LLAMA | {"qk_layernorm": True}, "rope"),
    "gpt, norms of heads": (GPT | {"qk_layernorm": True, "add_bias_linear": False}, "rope"),
    "llama, norms without weights": (LLAMA | {"qk_l2_norm": True}, "rope"),
    "squared ReLU": (GPT | {"activation_func": squared_relu}, "learned_absolute"),
    "GEGLU": (GPT | {"gated_linear_unit": True, "glu_linear_offset": 0.5}, "learned_absolute"),
    "gpt-oss": (GPT | QUICK, "learned_absolute"),
    "zero-centred LayerNorm": (
        GPT | ZERO_CENTRED | {"activation_func": squared_relu, "add_bias_linear": False},
        "rope",
    ),
    "zero-centred RMSNorm": (LLAMA | ZERO_CENTRED, "rope"),
    "llama, sinks": (LLAMA | {"softmax_type": "learnable"}, "rope"),
    "gpt, off by one in windows": (GPT | {"softmax_type": "off-by-one", "window_size": (4, 0)}, "rope"),
    "llama, windows": (LLAMA | {"window_size": (7, 0), "window_attn_skip_freq": 2}, "rope"),
    "llama, YaRN": (LLAMA, "yarn"),
    "llama, two tokens more": (LLAMA | {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.7}, "rope"),
    "gpt, a token more, no positions": (GPT | {"mtp_num_layers": 1}, "none"),
    "qwen3, gates": (LLAMA | {"qk_layernorm": True, "attention_output_gate": True}, "rope"),
    "gpt, gates, sinks in windows, a token more": (
        GPT
        | {"attention_output_gate": True, "softmax_type": "learnable", "window_size": (4, 0)}
        | {"num_query_groups": 3, "mtp_num_layers": 1},
        "rope",
    ),
    "qwen3, YaRN": (LLAMA | {"qk_layernorm": True}, "yarn"),
    "deepseek": (DEEPSEEK, "rope"),
    "deepseek, q-LoRA, yarn": (DEEPSEEK | {"q_lora_rank": 40} | YARN_OF_LATENTS, "rope"),
    "latents, GPT": (DEEPSEEK | GPT | {"qk_layernorm": False}, "learned_absolute"),
    "latents without norms, q-LoRA": (
        DEEPSEEK | {"q_lora_rank": 24, "qk_layernorm": False, "rotary_percent": 0.5},
        "none",
    ),
}
# Some features as they are, some slower, some in between; a factor of 1.35.
YARN = dict(
    rotary_scaling_factor=32.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.5, mscale=1.0,
    mscale_all_dim=0.0, correction_range_round_to_int=False,
)  # fmt: skip
VOCABULARY, SEQUENCE, STEPS = 173, 37, 20


class LatentDotProduct(DotProductAttention):
    """Megatron's unfused attention with the arguments that its multi-latent attention gives; only Transformer
    Engine's takes them."""

    def __init__(self, config, *args, k_channels=None, v_channels=None, **kwargs):
        super().__init__(config, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = self.num_attention_heads_per_partition * v_channels


class LatentSelfAttention(MLASelfAttention):
    """Megatron's own, which without q-LoRA asks for a norm of queries that it has no place for."""

    def _resolve_qk_norm_config(self, submodules):
        if self.config.q_lora_rank is not None:
            return super()._resolve_qk_norm_config(submodules)
        names = "linear_q_proj", "linear_kv_up_proj", "kv_layernorm"
        return {"q_layernorm": IdentityOp} | {name: getattr(submodules, name) for name in names}


def build(architecture: str, ours: bool):
    changes, positions = ARCHITECTURES[architecture]
    if not ours:  # torch's norms have no zero-centred weights: the same model with weights that are not
        changes = changes | {"layernorm_zero_centered_gamma": False}
    kind = AGoQLatentConfig if changes.get("multi_latent_attention") else AGoQTransformerConfig
    config = kind(
        num_layers=3, hidden_size=96, ffn_hidden_size=160, num_attention_heads=6,
        hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        bias_activation_fusion=False, apply_rope_fusion=False, **changes,
    )  # fmt: skip
    config.agoq = load_policy("off")
    if positions == "yarn":  # as Megatron makes them of its flags: no fields
        for name, value in YARN.items():
            setattr(config, f"yarn_{name}", value)
    if ours:
        spec = agoq_layer_spec(types.SimpleNamespace(transformer=config))
    else:
        spec = get_gpt_layer_local_spec(
            normalization=config.normalization,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            multi_latent_attention=config.multi_latent_attention,
        )
        if config.multi_latent_attention:
            spec.submodules.self_attention.module = LatentSelfAttention
            spec.submodules.self_attention.submodules.core_attention = LatentDotProduct
    further = None
    if config.mtp_num_layers:
        further = (
            predicting_spec(types.SimpleNamespace(transformer=config))
            if ours
            else (get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False))
        )
    return GPTModel(
        config, spec, mtp_block_spec=further, vocab_size=VOCABULARY, max_sequence_length=SEQUENCE,
        position_embedding_type=positions, rotary_base=10, share_embeddings_and_output_weights=False,
    ).to("cuda")  # fmt: skip


def planned(config, architecture: str) -> int:
    """Parameters of the model as the planner counts them."""
    args = types.SimpleNamespace(
        padded_vocab_size=VOCABULARY, position_embedding_type=ARCHITECTURES[architecture][1],
        max_position_embeddings=SEQUENCE, untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    return parameters(args, config, 0).total


def our_name(name: str, latents: bool) -> str:
    """Name in our model of a parameter of Megatron's local layers.

    Args:
        latents: the attention is multi-latent.
    """
    first = "linear_kv_down_proj" if latents else "linear_qkv"
    name = name.replace(".input_layernorm.", f".self_attention.{first}.layer_norm_")
    if latents:
        for one in ("q", "kv"):
            name = name.replace(f".{one}_layernorm.", f".linear_{one}_up_proj.layer_norm_")
    return name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def relative(a, b) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def compare(architecture: str, seed: int) -> dict:
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    stock, ours = build(architecture, ours=False), build(architecture, ours=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # norms away from one, biases away from zero: mistakes there must show
        for p in stock.parameters():
            if p.dim() == 1:
                p += 0.1 * torch.randn(p.shape, generator=generator).to(p.device)
    latents = ours.config.multi_latent_attention
    weights = {our_name(n, latents): p.detach().clone() for n, p in stock.named_parameters()}
    if ours.config.layernorm_zero_centered_gamma:
        of_norms = [n for n in weights if n.endswith(("norm_weight", "norm.weight"))]
        assert len(of_norms) == 4 * ours.config.num_layers + 1
        for name in of_norms:
            assert ours.get_parameter(name).count_nonzero() == 0
            weights[name] -= 1
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all("_extra_state" in n for n in missing), (missing, unexpected)

    silent = {name for name, module in ours.named_modules() if [*module.parameters(recurse=False)]}
    for name in silent.copy():
        ours.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: silent.discard(name))

    models = {"stock": stock, "ours": ours}
    # With Adam's usual epsilon a gradient that is nothing but rounding would make a whole step.
    # Megatron decays matrices alone: a zero-centred weight would decay to another value.
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
    for step in range(STEPS):
        tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=generator).to("cuda")
        mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool, device="cuda").triu(1)[None, None]
        for name, model in models.items():
            loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
            optimizers[name].zero_grad()
            loss.backward()
            losses[name].append(loss.item())
            further = MTPLossLoggingHelper.tracker.pop("loss_values", torch.zeros(0))
            losses[name] += further.tolist()
            if step == 0:
                gradients[name] = {n: p.grad.clone() for n, p in model.named_parameters()}
            optimizers[name].step()
    stock_gradients = {our_name(n, latents): g for n, g in gradients["stock"].items()}
    errors = {n: relative(gradients["ours"][n], g) for n, g in stock_gradients.items()}
    assert len(errors) == len(gradients["ours"])
    return {
        "gradient_errors": errors,
        "loss_error": max(abs(a - b) / b for a, b in zip(losses["ours"], losses["stock"], strict=True)),
        "losses": losses["ours"],
        "silent": sorted(silent),
        "sinks": [p.tensor_model_parallel for n, p in ours.named_parameters() if "softmax_offset" in n],
        "parameters": [sum(p.numel() for p in ours.parameters()), planned(ours.config, architecture)],
    }


def main() -> None:
    seed = int(sys.argv[1])
    os.environ.setdefault("RANK", "0")
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
        with torch.compiler.set_stance("force_eager"):  # Megatron's L2Norm compiles itself, for a minute
            results = {name: compare(name, seed) for name in sys.argv[2:]}
        torch.distributed.destroy_process_group()
    print("RESULT " + json.dumps(results))


if __name__ == "__main__":
    main()
