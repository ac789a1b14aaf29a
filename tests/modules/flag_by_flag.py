"""Builds the model's config, and models, once for each of many flags; writes what came of it as JSON.

Run as a script by the tests: the CPU facade changes a process for good. FLAGS_REPORT names the file:

- "configs": {attribute: fields of Megatron's configs that another value of the flag changes, or the error},
  of every flag of Megatron's that concerns the model;
- "models": {flags: {"stock" and "ours": [loss, norm of all gradients, parameters], "remarks": lines}};
- "frequencies": {way of building the model: its rotary frequencies}, of LLAMA_32.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import os
import sys

import torch

if not torch.cuda.is_available():
    from agoq_megatron.seams import cpu

    cpu.install()

from launch import TINY
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.arguments import add_megatron_arguments, validate_args
from megatron.training.global_vars import set_args

from agoq_megatron import calibrate
from agoq_megatron.checks import flag_register
from agoq_megatron.entries.command_line import DEFAULTS, add_arguments
from agoq_megatron.specs import agoq_layer_spec, model_config_from_args

BASE = [*TINY, "--train-iters", "10", "--agoq-activations", "off", "--distributed-backend", "gloo"]
BASE.remove("--bf16")
UNFUSED = [
    "--no-masked-softmax-fusion", "--no-bias-gelu-fusion", "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion", "--no-gradient-accumulation-fusion",
]  # fmt: skip
GPT = [*BASE, *UNFUSED]
for gone in (
    "--swiglu", "--disable-bias-linear", "--group-query-attention", "--untie-embeddings-and-output-weights",
):  # fmt: skip
    GPT.remove(gone)
for name in ("--normalization", "--position-embedding-type", "--num-query-groups"):
    at = GPT.index(name)
    del GPT[at : at + 2]

MODEL_GROUPS = ("network size", "mla", "mixed precision", "RNG and initialization", "Transformer-Engine")
# attribute: words that turn it on where one more, another choice or the flag alone would not do
OTHER = {
    "no_rope_freq": "2",
    "hidden_size": "256",
    "num_attention_heads": "8",
    "num_query_groups": "4",
    "kv_channels": "32",
    "rotary_percent": "0.5",
    "vocab_size": "63",
    "seq_length": "32",
    "max_position_embeddings": "128",
    "window_size": "8,0",
    "recompute_granularity": "full --recompute-method uniform --recompute-num-layers 1",
    "recompute_modules": "mlp --recompute-granularity selective",
    "pipeline_model_parallel_layout": "EttL",
    "attention_softmax_in_fp32": "--no-masked-softmax-fusion",
    "glu_linear_offset": "1 --no-bias-swiglu-fusion",
}
ANOTHER_ACTIVATION = ("squared_relu", "quick_geglu")
"""Flags that Megatron takes without ``--swiglu`` only."""


def of_yarn(name: str) -> bool:
    """Of flags that nothing reads without YaRN."""
    return name.startswith("yarn_") or name in ("rotary_scaling_factor", "mscale", "mscale_all_dim")


def parser() -> argparse.ArgumentParser:
    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)), DEFAULTS)


def other(action, value) -> list[str]:
    """Words that give a flag another value than ``value``."""
    if action.dest in OTHER:
        return [action.option_strings[0], *OTHER[action.dest].split()]
    if action.nargs == 0:
        return [action.option_strings[0]]
    for choice in action.choices or ():
        if choice != value:
            return [action.option_strings[0], getattr(choice, "name", str(choice))]
    number = value + 1 if isinstance(value, int) else 2 * value + 0.25 if isinstance(value, float) else 2
    return [action.option_strings[0], str(number)]


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """What parsing and Megatron's validation make of a run of one rank."""
    args = copy.copy(args)
    args.rank, args.world_size = 0, 1
    with contextlib.redirect_stdout(io.StringIO()):
        validate_args(args)
    args.padded_vocab_size = args.vocab_size + 1
    return args


def fields(config) -> dict[str, str]:
    """The fields of the model's config and of its transformer's, as words, and what Megatron adds to them."""
    found = {}
    for part in (config, config.transformer):
        own = {f.name for f in dataclasses.fields(part)}
        for name in own | {name for name in vars(part) if name.startswith("yarn_")}:
            value = getattr(part, name)
            found[name] = getattr(value, "__qualname__", None) or str(value).partition(" at 0x")[0]
    return found


def configs() -> dict[str, list[str] | str]:
    known, found, own = flag_register.megatron_flags(), {}, parser()
    plain, without = own.parse_args(BASE), [word for word in BASE if word != "--swiglu"]
    yarn = ["--position-embedding-type", "yarn"]
    latents = [*(w for w in BASE if w != "--group-query-attention"), "--multi-latent-attention"]
    references = {
        tuple(base): fields(model_config_from_args(settled(own.parse_args(base))))
        for base in (BASE, without, latents)
    }
    with_yarn = fields(model_config_from_args(settled(own.parse_args([*BASE, *yarn]))))
    for action in own._actions:
        flag = known.get(action.dest)
        if flag is None or flag.option != action.option_strings[0]:
            continue
        if not flag.in_config and flag.group not in MODEL_GROUPS:
            continue
        if action.dest == "multi_latent_attention":
            plainly = references[tuple(BASE)]
            its = references[tuple(latents)]
            found[action.dest] = sorted(name for name, value in its.items() if plainly.get(name) != value)
            continue
        base = latents if flag.group == "mla" else without if action.dest in ANOTHER_ACTIVATION else BASE
        reference = references[tuple(base)]
        try:
            words = other(action, getattr(plain, action.dest))
            words += yarn if of_yarn(action.dest) and base is BASE else []
            there = words[0] in base and not words[1:]
            args = own.parse_args([w for w in base if w != words[0]] if there else [*base, *words])
            built = fields(model_config_from_args(settled(args)))
        except (Exception, SystemExit) as problem:
            found[action.dest] = f"{type(problem).__name__}: {problem}"
        else:
            before = with_yarn if of_yarn(action.dest) else reference
            found[action.dest] = sorted(name for name in built if built[name] != before.get(name))
    return found


def loss_and_gradients(config, seed: int) -> list[float]:
    """[loss, norm of all gradients, number of parameters] of a model with biases and norms moved away from
    their initial zeros and ones."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_model(groups, pre_process=True, post_process=True)
    model = model.to("cuda")
    model.train()
    g = torch.Generator().manual_seed(seed)
    moved = torch.randn(10_000, generator=g).to("cuda") / 10
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += moved[: p.numel()]
    tokens = torch.randint(126, (2, 33), generator=g).to("cuda")
    positions = torch.arange(32, device="cuda").expand(2, -1)
    mask = torch.ones(32, 32, dtype=torch.bool, device="cuda").triu(1)[None, None]
    loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
    loss.backward()
    gradients = [p.grad.double().norm() for p in model.parameters()]
    return [loss.item(), torch.stack(gradients).norm().item(), sum(p.numel() for p in model.parameters())]


def models(cases: list[str], seed: int) -> dict[str, dict]:
    found, own = {}, parser()
    for case in cases:
        words = case.split()
        base = GPT if words[0] == "GPT" else [*BASE, *UNFUSED]
        line = [*base, *words[1:]]
        args = settled(own.parse_args(line))
        found[case] = {"remarks": flag_register.remarks(args, line)}
        for kind in ("stock", "ours"):
            config = model_config_from_args(args)
            if kind == "stock":
                config.transformer_layer_spec = get_gpt_layer_local_spec(
                    normalization=config.transformer.normalization,
                    qk_layernorm=config.transformer.qk_layernorm,
                    qk_l2_norm=config.transformer.qk_l2_norm,
                )
            found[case][kind] = loss_and_gradients(config, seed)
    return found


LLAMA_32 = "--use-rope-scaling --rope-scaling-factor 32 --rotary-base 500000 --kv-channels 64".split()


def frequencies() -> dict[str, list[float]]:
    args = settled(parser().parse_args([*BASE, *UNFUSED, *LLAMA_32]))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ways = {}
    config = model_config_from_args(args)
    ways["our entry point"] = config.get_builder_cls()(config).build_model(groups, True, True)
    ways["calibrate"] = calibrate.build_model(args)[0][0]
    # As Megatron-LM's own script does with --spec.
    os.environ["AGOQ_FLAGS"] = "--agoq-activations off"
    set_args(args)
    config = gpt_config_from_args(args, config=core_transformer_config_from_args(args, TransformerConfig))
    config.transformer_layer_spec = agoq_layer_spec
    ways["--spec"] = config.get_builder_cls()(config).build_model(groups, True, True)
    return {way: model.rotary_pos_emb.inv_freq.tolist() for way, model in ways.items()}


def main() -> None:
    cases, seed = json.loads(sys.argv[1]), int(sys.argv[2])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['FLAGS_REPORT']}.store", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    with torch.compiler.set_stance("force_eager"):  # Megatron's L2Norm compiles itself, for a minute
        found = {"configs": configs(), "models": models(cases, seed), "frequencies": frequencies()}
    with open(os.environ["FLAGS_REPORT"], "w") as f:
        json.dump(found, f)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
