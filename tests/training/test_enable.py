"""``agoq_megatron.enable`` in a program of its own: what it gives, what it refuses, and that nothing stays.

Run as a script it does what the tests look at: the CPU facade changes a process for good.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from enabled_models import (
    SEQUENCE,
    STEPS,
    config_of,
    gpt,
    local_spec,
    optimizer_for,
    parts,
    trained,
    wrapped,
)

CHECKS = (
    "megatron.core is as it was", "while it is open only what is listed is other",
    "specs give the same model", "as by our own config", "two models at once", "planned is measured",
    "gradients are checked", "closed: evaluation", "all three parts are there", "a model of its own config",
    "without labels nothing is overwritten", "functions that say the step",
)  # fmt: skip
ALL = {"grad_bits": 8, "optimizer_bits": 8, "rounding": "stochastic", "seed": 5}

# what is asked for, and words that the refusal must hold: of enable itself
CALLS = {
    "an unknown name": ({"grad_bit": 8}, ["'grad_bit'", "grad_bits"]),
    "an unknown value": ({"grad_bits": 4}, ["grad_bits=4", "32 or 16 or 8"]),
    "a number for a word": ({"activations": 4}, ["activations=4", "str"]),
    "True for a number": ({"measure_interval": True}, ["measure_interval=True", "int"]),
    "no policy": ({"activations": "agoq9"}, ["activations agoq9", "uniform4"]),
    "a computed policy": ({"activations": "auto"}, ["activations='auto'"]),
    "gradients in 16 bits": ({"grad_bits": 16}, ["grad_reduce_in_fp32=False"]),
    "a format without 8 bits": ({"grad_code": "e4m3"}, ["grad_code", "grad_bits 8"]),
    "what belongs to a loop": ({"report": "r.json"}, ["report", "measured()"]),
    "rounding without states": (
        {"optimizer_rounding": "nearest"},
        ["optimizer_rounding", "optimizer_bits 8"],
    ),
    "a bound of nothing": ({"check_bound": 0.0}, ["check_bound", "above 0"]),
    "a negative seed": ({"seed": -1}, ["seed -1"]),
}
# of the model: changes of its config, of GPTModel's arguments, words
MODELS = {
    "experts": ({"num_moe_experts": 2, "moe_ffn_hidden_size": 32}, {}, ["num_moe_experts", "mixture"]),
    "sequences over ranks": ({"context_parallel_size": 2}, {}, ["context_parallel_size: ", "command line"]),
    "dropout of all": ({"attention_dropout": 1.0}, {}, ["attention_dropout 1.0", "below 1"]),
    "an FP32 stream": ({"fp32_residual_connection": True}, {}, ["fp32_residual_connection"]),
    "autocast": ({"enable_autocast": True}, {}, ["TransformerConfig.enable_autocast"]),
    "heads of 12": ({"kv_channels": 12}, {}, ["kv_channels 12", "multiples of 8"]),
    "norms in the config alone": (
        {"qk_layernorm": True},
        {},
        ["layer spec has no norms", "qk_layernorm=True"],
    ),
    "other positions": ({}, {"position_embedding_type": "mrope"}, ["position_embedding_type", "rope"]),
    "another activation": ({"activation_func": torch.tanh}, {}, ["tanh"]),
}


@pytest.fixture(scope="module")
def outcomes(launcher, tmp_path_factory):
    seed, path = int.from_bytes(os.urandom(3), "big"), tmp_path_factory.mktemp("enable") / "found.json"
    print("seed", seed)
    launcher.script(__file__, path, seed, timeout=200)
    return json.loads(path.read_text())


@pytest.mark.parametrize("check", CHECKS)
def test_enable(outcomes, check):
    assert outcomes[check] is True, outcomes[check]


@pytest.mark.parametrize("case", CALLS)
def test_calls_are_refused(outcomes, case):
    said = outcomes["refused"][case]
    assert said and "--" not in said and all(word in said for word in CALLS[case][1]), said


@pytest.mark.parametrize("case", MODELS)
def test_models_are_refused(outcomes, case):
    said = outcomes["refused"][case]
    assert said and "--" not in said and all(word in said for word in MODELS[case][2]), said


def test_others_are_refused(outcomes):
    for case, words in {
        "another layer": ["layer spec's layers", "Odd"],
        "another MLP": ["layer spec's MLPs", "OddMLP"],
        "a DDP of FSDP": ["use_megatron_fsdp"],
        "a subclass of DDP": ["OwnDDP", "subclasses"],
        "a model from before": ["built before enable()"],
        "states without a distributed optimizer": ["use_distributed_optimizer", "optimizer_bits 8"],
        "another optimizer": ["optimizer with grad_bits 8", "adam"],
        "a step that nobody says": ["step(n)", "iteration="],
        "training after it was closed": ["closed"],
        "a config of another": ["config of its own"],
        "both ways to say the step": ["one of them"],
        "a group that does not divide": ["group 128", "64 features"],
    }.items():
        said = outcomes["refused"][case]
        assert said and all(word in said for word in words), (case, said)
    assert outcomes["refused"]["left"] == []  # in the config of the model that was refused


# -------------------------------------------------------------------- in the script


def enabled(weights: int, spec=local_spec, changes=(), **flags):
    """A handle, and a model, DDP and optimizer that were made in it."""
    import agoq_megatron

    handle, config = agoq_megatron.enable(**ALL | flags), config_of(**dict(changes))
    model = wrapped(gpt(config, spec(config), weights), config)
    return handle, model, optimizer_for(model)


def by_our_config(seed: int) -> list:
    """The same without ``enable``, as tests of the parts make it."""
    from types import SimpleNamespace

    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from agoq_megatron.autograd.cross_entropy import vocab_parallel_cross_entropy
    from agoq_megatron.gradients.data_parallel import QuantizedGradientDDP, wrap_embedding_reduction
    from agoq_megatron.gradients.settings import GradientFormat, GradientSettings
    from agoq_megatron.model.transformer_config import AGoQTransformerConfig
    from agoq_megatron.optimizer.quantized_states import optimizer_of
    from agoq_megatron.optimizer.settings import OptimizerSettings
    from agoq_megatron.optimizer.shard import wrap_clipping, wrap_counting_zeros
    from agoq_megatron.policy.policy import load_policy
    from agoq_megatron.seams import compat, compat_core
    from agoq_megatron.specs import agoq_layer_spec

    config = AGoQTransformerConfig(**{k: v for k, v in vars(config_of()).items() if not k.startswith("_")})
    config.agoq = load_policy("agoq", "stochastic")
    config.agoq_gradients = GradientSettings(GradientFormat(residual_bits=4, rounding="stochastic"))
    config.agoq_run.counter.seed(ALL["seed"])
    model = gpt(config, agoq_layer_spec(SimpleNamespace(transformer=config)), seed)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=40_000
    )
    model = QuantizedGradientDDP(config, ddp, Float16Module(config, model))
    with compat_core.replaced(
        "megatron.core.optimizer", DistributedOptimizer=optimizer_of(OptimizerSettings())
    ):
        optimizer = optimizer_for(model)
    names = compat_core.Names(compat_core.SHARED)
    compat.bind_gradient_clipping()
    compat.bind_gradient_statistics(wrap_clipping, wrap_counting_zeros, wrap_embedding_reduction)
    names.settle()
    try:
        with compat_core.replaced(
            "megatron.core.tensor_parallel", vocab_parallel_cross_entropy=vocab_parallel_cross_entropy
        ):
            return trained(model, optimizer, seed, config.agoq_run.counter.begin_iteration)
    finally:
        names.put_back()


def names_of_core() -> dict:
    """Every name of megatron.core's modules and of their classes, and what it stands for."""
    found = {}
    for module, names in list(sys.modules.items()):
        if module.split(".")[:2] != ["megatron", "core"] or names is None:
            continue
        for name, value in list(vars(names).items()):
            found[module, name] = value
            if isinstance(value, type) and value.__module__ == module:
                found |= {(f"{module}:{name}", inner): it for inner, it in vars(value).items()}
    return found


def other(a: dict, b: dict) -> list:
    """Names that are another object in ``b``, or not there; dunders that Python itself makes apart."""
    own = ("__dict__", "__weakref__", "__warningregistry__", "__abstractmethods__", "__builtins__")
    return sorted(
        key for key in a.keys() | b.keys()
        if key[1] != "_CUDA_RNG_STATE_TRACKER"  # which the seeding here makes anew
        and key[1] not in own and not key[1].startswith("_abc_") and a.get(key, 0) is not b.get(key, 0)
    )  # fmt: skip


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def refusals(seed: int) -> dict[str, str | None]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    import agoq_megatron

    said = {}

    def refused(case: str, call) -> None:
        try:
            call()
            said[case] = None
        except agoq_megatron.UsageError as problem:
            said[case] = str(problem)

    for case, (flags, _) in CALLS.items():
        refused(case, lambda flags=flags: agoq_megatron.enable(**flags))
    before = gpt(config_of(), local_spec(), seed)
    path = Path(tempfile.mkdtemp()) / "odd.yaml"
    path.write_text(
        "configs:\n  odd: {bits: 4, code: nf4, group: 128, scale_bits: 8}\nmatchers:\n"
        '  all: {config: odd, type: glob, pattern: "*", enabled: true}\n'
    )
    with agoq_megatron.enable(activations=str(path)):
        half = config_of()
        refused("a group that does not divide", lambda: gpt(half, local_spec(), seed))
        said["left"] = [name for name in vars(half) if name.startswith("agoq")]
    with agoq_megatron.enable(**ALL) as handle:
        for case, (changes, more, _) in MODELS.items():
            refused(case, lambda c=changes, m=more: gpt(config_of(**c), local_spec(), seed, **m))
        odd = type("Odd", (TransformerLayer,), {})
        spec = local_spec()
        spec.module = odd
        refused("another layer", lambda: gpt(config_of(), spec, seed))
        of_mlp = local_spec()
        of_mlp.submodules.mlp = type("OddMLP", (MLP,), {}).as_mlp_submodule
        refused("another MLP", lambda: gpt(config_of(), of_mlp, seed))
        config = config_of()
        model = gpt(config, local_spec(), seed)
        refused("a DDP of FSDP", lambda: wrapped(model, config, use_megatron_fsdp=True))
        own = type("OwnDDP", (DistributedDataParallel,), {})
        refused("a subclass of DDP", lambda: own(config, DistributedDataParallelConfig(), model))
        refused("a model from before", lambda: wrapped(before, before.config))
        ddp = wrapped(model, config)
        bad = {"use_distributed_optimizer": False}
        refused("states without a distributed optimizer", lambda: optimizer_for(ddp, **bad))
        refused("another optimizer", lambda: optimizer_for(ddp, optimizer="muon"))
        tokens = torch.zeros(1, SEQUENCE, dtype=torch.long)
        refused("a step that nobody says", lambda: ddp(tokens, tokens, None, labels=tokens))
        with agoq_megatron.enable(iteration=lambda: 0) as another:
            refused("a config of another", lambda: gpt(config, local_spec(), seed))
            refused("both ways to say the step", lambda: another.step(1))
        handle.step(0)
        ddp(tokens, tokens, None, labels=tokens)
    refused("training after it was closed", lambda: ddp(tokens, tokens, None, labels=tokens))
    with torch.no_grad():
        said["evaluation"] = bool(torch.isfinite(ddp(tokens, tokens, None, labels=tokens)).all())
    return said


def specs(config):
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    return (
        local_spec(), get_gpt_layer_with_transformer_engine_spec(),
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm"),
        get_gpt_decoder_block_spec(config, use_transformer_engine=True),
    )  # fmt: skip


def main(path: Path, seed: int) -> None:
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs

    import agoq_megatron
    from agoq_megatron.gradients.data_parallel import QuantizedGradientDDP
    from agoq_megatron.modules.layer import TransformerLayer
    from agoq_megatron.optimizer.quantized_states import QuantizedStateOptimizer
    from agoq_megatron.seams import compat_core

    found = {}
    heard = Heard()
    logging.getLogger("agoq_megatron").addHandler(heard)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        expected = by_our_config(seed)
        alone = []
        for number, flags in enumerate(({}, {"activations": "uniform4", "seed": 6, "grad_bits": 32})):
            handle, model, optimizer = enabled(seed + number, **flags)
            alone.append(trained(model, optimizer, seed + number, handle.step))
            handle.close()
        found["as by our own config"] = alone[0] == expected
        names = names_of_core()
        handle, model, optimizer = enabled(seed)
        changed = other(names, names_of_core())
        places = {place for place in compat_core.ALL}
        found["while it is open only what is listed is other"] = bool(changed) and set(changed) <= places
        found["all three parts are there"] = (
            isinstance(model, QuantizedGradientDDP)
            and isinstance(model.module.module.decoder.layers[0], TransformerLayer)
            and any(isinstance(it, QuantizedStateOptimizer) for it in optimizer.chained_optimizers)
        )
        trained(model, optimizer, seed, handle.step)
        handle.close()
        left = other(names, names_of_core())
        found["megatron.core is as it was"] = not left or list(map(str, left))

        losses = []
        for i in range(4):
            with agoq_megatron.enable(**ALL) as handle:
                config = config_of()
                model = wrapped(gpt(config, specs(config)[i], seed), config)
                losses.append(trained(model, optimizer_for(model), seed, handle.step))
        found["specs give the same model"] = all(it == expected for it in losses) and (
            gpt_layer_specs.TESpecProvider is None
        )

        both = [enabled(seed), enabled(seed + 1, activations="uniform4", seed=6, grad_bits=32)]
        calls = [parts(m, o, seed + i, h.step) for i, (h, m, o) in enumerate(both)]
        at_once = [[], []]
        while len(at_once[1]) < 2 * STEPS:
            for i in (0, 1):
                at_once[i].append(next(calls[i]))
        for call in calls:
            next(call, None)
        for i, (_, m, _) in enumerate(both):
            at_once[i] += [p.detach().float().sum().item() for p in m.parameters()]
        for handle, *_ in both:  # the first one first
            handle.close()
        found["two models at once"] = at_once == alone

        count = iter(range(2 * STEPS))
        now = [0]
        handle, model, optimizer = enabled(seed, iteration=lambda: now[0])
        found["functions that say the step"] = (
            trained(model, optimizer, seed, lambda n: now.__setitem__(0, next(count))) == expected
        )
        handle.close()

        heard.lines.clear()
        handle, model, optimizer = enabled(seed, check_bound=1e-9)
        watched = trained(model, optimizer, seed, handle.step)
        said = [line for line in heard.lines if "check_bound" in line and "probe_interval" not in line]
        found["gradients are checked"] = bool(said) and watched == expected
        rows = handle.measured()
        planned, measured = (
            sum(row[f"{kind}_bytes_per_token"] for row in rows) for kind in ("planned", "measured")
        )
        found["planned is measured"] = planned > 0 and abs(planned - measured) < 1e-6 * planned or rows
        handle.close()

        with agoq_megatron.enable(activations="off") as handle:
            first = config_of()
            a = gpt(first, local_spec(), seed)
            copied = copy.deepcopy(first)
            b = gpt(copied, local_spec(), seed)
            chunk = gpt(first, local_spec(), seed)
            found["a model of its own config"] = (
                first.agoq_run is not copied.agoq_run
                and a.agoq_enabled is not b.agoq_enabled
                and a.agoq_enabled is chunk.agoq_enabled
            )
            tokens = torch.arange(SEQUENCE)[None]
            logits = a.bfloat16()(tokens, tokens, None)
            kept = logits.detach().clone()
            logits.float().logsumexp(-1).sum().backward()
            found["without labels nothing is overwritten"] = torch.equal(logits, kept)
        found["refused"] = refusals(seed)
        found["closed: evaluation"] = found["refused"].pop("evaluation")
        dist.destroy_process_group()
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
