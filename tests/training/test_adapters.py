"""Low-rank adapters beside frozen weights: their gradients, and what is kept for them.

Run as a script it trains: the CPU facade changes a process for good.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

FC2 = "mlp.linear_fc2.input"
VOCABULARY, SEQUENCE, RANK, ALPHA, LAYERS = 61, 24, 4, 6.0, 2
SHAPES = {  # of the parity with stock layers; of the bytes, with LLaMA-3-8B's ratios
    "gradients": dict(
        hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, kv_channels=16
    ),
    "bytes": dict(
        hidden_size=512, ffn_hidden_size=1792, num_attention_heads=4, num_query_groups=1, kv_channels=128
    ),
}  # fmt: skip


FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"])
GATED = dict(attention_output_gate=True, attention_dropout=0.2, hidden_dropout=0.1)
# targets, changes of the config
COMBINED = {
    "gates and dropout": ("all", GATED),
    "MLPs run again": ("linear_fc2", SELECTIVE),
    "gates and dropout, layers run again": ("linear_proj linear_fc1", GATED | FULL),
}


@pytest.fixture(scope="module")
def outcomes(launcher, tmp_path_factory):
    seed, path = int.from_bytes(os.urandom(3), "big"), tmp_path_factory.mktemp("adapters") / "found.json"
    print("seed", seed)
    launcher.script(__file__, path, seed, timeout=200)
    return json.loads(path.read_text())


@pytest.mark.parametrize("targets", ["all", "linear_qkv linear_fc2", "linear_fc1"])
def test_gradients_are_those_of_merged_weights(outcomes, targets):
    """In FP32 with everything kept: where D is the gradient of W in Megatron's own layers with ``W + s B A``
    for W, A's is ``s B^T D``, and B's ``s D A^T``."""
    errors, silent = outcomes["gradients"][targets]
    assert max(errors.values()) < 1e-5, errors
    assert len(errors) == 2 * LAYERS * (4 if targets == "all" else len(targets.split())) and not silent


@pytest.mark.parametrize("case", COMBINED)
def test_gradients_with_what_else_an_attention_has(outcomes, case):
    """Gates, both dropouts, and recomputation, within which adapters of the first layer must not be lost."""
    errors, silent = outcomes["combined"][case]
    assert errors and max(errors.values()) < 1e-5, errors
    assert not silent


def test_rounded_gradients_are_close(outcomes):
    errors = outcomes["rounded"]
    assert 1e-4 < max(errors.values()) and sum(errors.values()) / len(errors) < 0.15, errors


def test_fewer_bytes_are_kept(outcomes):
    """Than 60% of what full training keeps by the same policy; as planned, tensor by tensor."""
    rows = outcomes["bytes"]
    kept = {name: sum(row["measured_bytes_per_token"] for row in of) for name, of in rows.items()}
    assert kept["adapters"] <= 0.6 * kept["whole"], kept
    for name, of in rows.items():
        for row in of:
            low = row["name"].startswith("other")  # what enters B: r numbers beside each of two products
            planned = 2 * 2 * 16 if low and name == "adapters" else row["planned_bytes_per_token"]
            assert row["measured_bytes_per_token"] == pytest.approx(planned, rel=0.01), row


def test_nothing_is_kept_for_frozen_weights(outcomes):
    """Norm and SwiGLU outputs, where the policy keeps them, serve weights' gradients alone."""
    names = {row["name"]: row["measured_bytes_per_token"] for row in outcomes["off"]}
    for row in outcomes["off"]:
        if not row["name"].startswith("other"):
            assert row["measured_bytes_per_token"] == pytest.approx(
                row["planned_bytes_per_token"], rel=0.01
            ), row
    assert names["self_attention.linear_qkv.norm_input"] > 0 and names["mlp.linear_fc1.output"] > 0
    for name in (
        "self_attention.linear_qkv.norm_output",
        "mlp.linear_fc1.norm_output",
        "mlp.linear_fc2.input",
    ):
        assert name not in names, name


def test_all_three_parts_train_adapters(outcomes):
    losses, frozen_moved = outcomes["trained"]
    assert min(losses[-5:]) < losses[0] - 0.2 and not frozen_moved


def test_what_cannot_be_is_refused(outcomes):
    assert "rank 0" in outcomes["refused"][0] and "linear_qvk" in outcomes["refused"][1]


# -------------------------------------------------------------------- in the script


def config_of(shape: str, **changes):
    import torch.nn.functional as F
    from megatron.core.transformer.transformer_config import TransformerConfig

    own = dict(
        num_layers=LAYERS, hidden_dropout=0.0, attention_dropout=0.0, gated_linear_unit=True,
        activation_func=F.silu, add_bias_linear=False, normalization="RMSNorm",
    )  # fmt: skip
    return TransformerConfig(**own | SHAPES[shape] | changes)


def gpt(config, seed: int):
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), VOCABULARY, SEQUENCE,
        position_embedding_type="rope", rotary_base=10, share_embeddings_and_output_weights=False,
    )  # fmt: skip


def loss_of(model, seed: int):
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)  # masks of dropout
    torch.manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(SEQUENCE).expand(2, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:].contiguous()).mean()


def adapted(seed: int, targets, activations: str, shape: str = "gradients", rank: int = RANK, **changes):
    """A model with adapters that are not zero, in an open handle."""
    import agoq_megatron
    from agoq_megatron.modules.adapters import TARGETS, add_adapters

    handle = agoq_megatron.enable(activations=activations)
    model = gpt(config_of(shape, **changes), seed)
    adapters = add_adapters(model, rank, ALPHA, TARGETS if targets == "all" else targets.split())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters:
            adapter.b.copy_(0.05 * torch.randn(adapter.b.shape, generator=generator))
    handle.step(0)
    return handle, model


def gradients(seed: int, targets: str, activations: str, **changes) -> tuple[dict[str, float], list[str]]:
    """Relative errors against stock layers with merged weights; frozen parameters that have a gradient."""
    handle, model = adapted(seed, targets, activations, **changes)
    loss_of(model, seed).backward()
    handle.close()
    of_model = {name: it for name, it in changes.items() if not name.startswith("recompute")}
    merged = gpt(config_of("gradients", **of_model), seed)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in merged.named_parameters():
            ours = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
            ours = ours.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
            p.copy_(own[ours])
            module = name.removesuffix(".weight")
            if f"{module}.adapter.a" in own:
                p += ALPHA / RANK * own[f"{module}.adapter.b"] @ own[f"{module}.adapter.a"]
    loss_of(merged, seed).backward()
    errors = {}
    for name, p in merged.named_parameters():
        module = name.removesuffix(".weight")
        a, b = own.get(f"{module}.adapter.a"), own.get(f"{module}.adapter.b")
        if a is None:
            continue
        for key, got, expected in (
            ("a", a.grad, ALPHA / RANK * b.detach().t() @ p.grad),
            ("b", b.grad, ALPHA / RANK * p.grad @ a.detach().t()),
        ):
            errors[f"{module}.{key}"] = ((got - expected).norm() / expected.norm()).item()
    return errors, [n for n, p in own.items() if "adapter" not in n and p.grad is not None]


def rows(seed: int, adapters: bool, activations: str = "agoq", targets: str = "all") -> list[dict]:
    """Measured bytes a token and layer, by tensor."""
    import agoq_megatron

    bf16 = {"bf16": True, "params_dtype": torch.bfloat16}
    if adapters:
        handle, model = adapted(seed, targets, activations, "bytes", rank=16, **bf16)
    else:
        handle = agoq_megatron.enable(activations=activations)
        model = gpt(config_of("bytes", **bf16), seed)
        handle.step(0)
    loss_of(model, seed).backward()
    handle.close()
    return model.agoq_enabled.meter.rows()


def trained(seed: int) -> tuple[list[float], bool]:
    from megatron.core import distributed
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    import agoq_megatron
    from agoq_megatron.modules.adapters import add_adapters

    bf16 = {"bf16": True, "params_dtype": torch.bfloat16}
    config, losses = config_of("gradients", **bf16), []
    with agoq_megatron.enable(grad_bits=8, optimizer_bits=8) as handle:
        model = gpt(config, seed)
        add_adapters(model, 64, 128.0)
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        ddp = distributed.DistributedDataParallelConfig(use_distributed_optimizer=True)
        whole = distributed.DistributedDataParallel(config, ddp, Float16Module(config, model))
        adam = OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True, **bf16)
        optimizer = get_megatron_optimizer(adam, [whole], use_gloo_process_groups=False)
        for n in range(50):
            handle.step(n)
            whole.zero_grad_buffer()
            loss = loss_of(whole, seed)
            loss.backward()
            whole.finish_grad_sync()
            optimizer.step()
            losses.append(loss.item())
        moved = [n for n, p in model.named_parameters() if n in frozen and not torch.equal(p, frozen[n])]
    return losses, bool(moved)


def main(path: Path, seed: int) -> None:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()
    from megatron.core import parallel_state

    from agoq_megatron.modules.adapters import add_adapters

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        every = ("all", "linear_qkv linear_fc2", "linear_fc1")
        found["gradients"] = {targets: gradients(seed, targets, "off") for targets in every}
        found["combined"] = {
            case: gradients(seed, targets, "off", **changes) for case, (targets, changes) in COMBINED.items()
        }
        found["rounded"] = gradients(seed, "all", "agoq")[0]
        found["bytes"] = {"whole": rows(seed, adapters=False), "adapters": rows(seed, adapters=True)}
        found["off"] = rows(seed, adapters=True, activations="off", targets="linear_proj")
        found["trained"] = trained(seed)
        found["refused"] = []
        for rank, targets in ((0, ["linear_qkv"]), (1, ["linear_qvk"])):
            try:
                add_adapters(torch.nn.Linear(2, 2), rank, 1.0, targets)
            except ValueError as problem:
                found["refused"].append(str(problem))
        dist.destroy_process_group()
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
