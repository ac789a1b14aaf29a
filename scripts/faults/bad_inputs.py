# ruff: noqa: E501 - tables of cases, a line each
"""Generated flags and policy files that cannot work, for ``throw_faults.py``.

Each case is drawn from the flags of ``agoq_megatron/config.py`` as they are (types, choices), from what does
not go together, from what Megatron has and this project does not carry, and from a good policy file in which
one thing is broken. A case says what its error must name; for a policy file the line, too.
"""

from __future__ import annotations

import random
import re
import sys
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import fault_runs as runs
from fault_runs import MODEL

STARTED = 99
"""Status of a run that came as far as torch.distributed."""


@dataclass
class Case:
    """A command line that must be refused.

    Attributes:
        what: in words.
        flags: after the model's own.
        names: strings of which the error must hold one each: a flag, a key, a line.
        without: flags of the model that are left out, without values.
    """

    what: str
    flags: list[str]
    names: list[str]
    without: tuple[str, ...] = ()


@dataclass
class Answer:
    """What became of a case."""

    case: Case
    code: int
    error: str
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def _words(rng: random.Random) -> str:
    return rng.choice(["yes", "none", "fast", "8bit", "int4", "3.5", "-1", "7", "64", "NaN", "two hop", ""])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def wrong_value(rng: random.Random, folder: Path) -> Case:
    """A value that a flag of ours does not take, by its type."""
    from agoq_megatron.config import AGoQConfig

    usable = [f for f in fields(AGoQConfig) if f.type is not bool and f.type is not str]
    chosen = rng.choice([f for f in usable if f.name != "agoq_report"])
    name = _flag(chosen.name)
    choices = [v for t in (chosen.type, *typing.get_args(chosen.type)) for v in typing.get_args(t)]
    literal = [str(v) for v in (typing.get_args(chosen.type) or ())] + [str(v) for v in choices]
    while True:
        value = _words(rng)
        whole = re.fullmatch(r"-?\d+", value)
        number = re.fullmatch(r"\d+(\.\d+)?", value) and "float" in str(chosen.type)
        if value in literal or number or (whole and "int" in str(chosen.type)):
            continue
        return Case(f"{name} {value!r}", [f"{name}={value}"], [name])


def no_value(rng: random.Random, folder: Path) -> Case:
    """A flag that wants a value, at the end of the line; or an empty one."""
    from agoq_megatron.checks.saving import NOT_EMPTY
    from agoq_megatron.config import AGoQConfig

    if rng.random() < 0.3:
        name = _flag(rng.choice(NOT_EMPTY))
        return Case(f"{name}=", [f"{name}="], [name])
    name = _flag(rng.choice([f.name for f in fields(AGoQConfig) if f.type is not bool]))
    return Case(f"{name} without a value", [name], [name])


def misspelt(rng: random.Random, folder: Path) -> Case:
    """A flag of ours with a letter too few or two letters exchanged."""
    from agoq_megatron.config import AGoQConfig

    names = [_flag(f.name) for f in fields(AGoQConfig)]
    while True:
        name = rng.choice(names)
        at = rng.randrange(3, len(name) - 2)
        wrong = rng.choice([name[:at] + name[at + 1 :], name[:at] + name[at + 1] + name[at] + name[at + 2 :]])
        if not any(known.startswith(wrong) for known in names):
            return Case(f"misspelt {wrong}", [wrong, "8"], [wrong])


def out_of_range(rng: random.Random, folder: Path) -> Case:
    """A number of the right type beyond its range."""
    name, low, more = rng.choice(
        [
            ("--agoq-seed", -1, []),
            ("--agoq-loss-chunks", 0, []),
            ("--agoq-grad-node-size", 1, ["--agoq-grad-bits", "8"]),
            ("--agoq-grad-probe-interval", -1, ["--agoq-grad-bits", "8"]),
            ("--agoq-measure-interval", -1, []),
            ("--num-layers", 0, []),
            ("--num-attention-heads", 0, []),
            ("--hidden-size", 0, []),
            ("--seq-length", 0, []),
            ("--micro-batch-size", 0, []),
            ("--global-batch-size", 0, []),
            ("--train-iters", 0, []),
            ("--save-interval", 0, ["--save", str(folder / "saved")]),
            ("--tensor-model-parallel-size", 0, []),
            ("--pipeline-model-parallel-size", 0, []),
            ("--log-interval", 0, []),
            ("--ckpt-step", 0, ["--load", str(folder / "saved")]),
        ]
    )
    value = low - rng.choice([0, 1, 5, 1000])
    return Case(f"{name} {value}", [*more, f"{name}={value}"], [name])


_GRADIENT_OPTIONS = (
    ("--agoq-grad-residual-bits", "4"),
    ("--agoq-grad-rounding", "stochastic"),
    ("--agoq-grad-scale", "least-squares"),
    ("--agoq-grad-code", "e4m3"),
    ("--agoq-grad-reduce", "two-hop"),
    ("--agoq-grad-node-size", "4"),
    ("--agoq-grad-probe-interval", "3"),
)
_NOT_TOGETHER: tuple[tuple[list[str], list[str], tuple[str, ...]], ...] = (
    (["--agoq-grad-bits", "8", "--agoq-grad-code", "e4m3", "--agoq-grad-residual-bits", "4"], ["-code"], ()),
    (
        ["--agoq-grad-bits", "8", "--agoq-grad-code", "e4m3", "--agoq-grad-rounding", "stochastic"],
        ["-rounding"], (),
    ),
    (
        ["--agoq-grad-bits", "8", "--agoq-grad-scale", "least-squares", "--agoq-grad-residual-bits", "4"],
        ["-scale"], (),
    ),
    (["--agoq-grad-bits", "8", "--grad-reduce-in-bf16"], ["--grad-reduce-in-bf16"], ()),
    (["--agoq-grad-bits", "8", "--accumulate-allreduce-grads-in-fp32"], ["--accumulate-allreduce"], ()),
    (["--agoq-grad-bits", "8", "--optimizer", "muon"], ["--optimizer"], ("--use-distributed-optimizer",)),
    (["--agoq-grad-bits", "8", "--agoq-grad-reduce", "flat", "--agoq-grad-node-size", "2"], ["flat"], ()),
    (["--agoq-grad-bits", "16"], ["--agoq-grad-bits 16", "--bf16"], ("--bf16",)),
    (["--agoq-grad-bits", "16", "--accumulate-allreduce-grads-in-fp32"], ["--agoq-grad-bits 16"], ()),
    (["--agoq-optimizer-bits", "8"], ["--use-distributed-optimizer"], ("--use-distributed-optimizer",)),
    (["--agoq-optimizer-bits", "8"], ["--bf16"], ("--bf16",)),
    (["--agoq-master-weights", "split"], ["--bf16"], ("--bf16",)),
    (["--agoq-master-weights", "split"], ["--use-distributed-optimizer"], ("--use-distributed-optimizer",)),
    (["--agoq-optimizer-rounding", "nearest"], ["--agoq-optimizer-bits 8"], ()),
    (["--agoq-optimizer-bits", "8", "--use-precision-aware-optimizer"], ["--use-precision-aware"], ()),
    (["--agoq-optimizer-bits", "8", "--optimizer-cpu-offload"], ["--optimizer-cpu-offload"], ()),
    (["--agoq-loss", "megatron", "--agoq-loss-chunks", "2"], ["--agoq-loss megatron"], ()),
    (["--agoq-loss-chunks", "2", "--cross-entropy-loss-fusion"], ["--cross-entropy-loss-fusion"], ()),
    (["--exit-signal", "sigusr1"], ["--exit-signal"], ()),
    (["--exit-signal", "10"], ["--exit-signal"], ()),
    (["--ckpt-step", "5"], ["--ckpt-step", "--load"], ()),
    (["--use-checkpoint-args"], ["--load"], ()),
    (["--global-batch-size", "3", "--micro-batch-size", "2"], ["batch size"], ()),
    (["--lr-warmup-iters", "50"], ["--lr-warmup-iters"], ()),
    (["--recompute-granularity", "selective", "--recompute-modules", "mla_up_proj"], ["mla_up_proj"], ()),
    (["--fp16"], ["--fp16"], ("--bf16",)),
    (["--fp16"], ["fp16"], ()),
    (["--save", "/dev/null/x"], ["--save"], ()),
    (["--save", "/proc/agoq"], ["--save"], ()),
    (["--wandb-project", "p"], ["--tensorboard-dir"], ()),
    (["--data-path", "/no/such/corpus"], ["/no/such/corpus"], ("--mock-data",)),
    ([], ["--data-path"], ("--mock-data",)),
    (["--agoq-report", "/no/such/folder/x.json"], ["--agoq-report"], ()),
    (["--agoq-report", "/"], ["--agoq-report"], ()),
    (["--agoq-report", "/proc/x.json"], ["--agoq-report"], ()),
    (["--async-save"], ["--use-persistent-ckpt-worker"], ()),
    (["--async-save", "--use-persistent-ckpt-worker"], ["--async-strategy"], ()),
)  # fmt: skip


def not_together(rng: random.Random, folder: Path) -> Case:
    """Flags that exclude or need each other."""
    if rng.random() < 0.25:
        name, value = rng.choice(_GRADIENT_OPTIONS)
        more = rng.choice([[], ["--agoq-grad-bits", "16"]])
        return Case(f"{name} of other gradients", [*more, name, value], [name, "--agoq-grad-bits 8"])
    flags, names, without = rng.choice(_NOT_TOGETHER)
    return Case(" ".join(flags + [f"no {w}" for w in without]), list(flags), list(names), without)


_NOT_CARRIED = (
    "--cuda-graph-impl local",
    "--fp8-format hybrid", "--fp8-format e4m3", "--fp4-format e2m1", "--qk-clip",
    "--hybrid-layer-pattern M*M*",
    "--fp32-residual-connection",
    "--apply-residual-connection-post-layernorm", "--use-megatron-fsdp",
    "--use-torch-fsdp2", "--cpu-offloading-num-layers 1", "--fine-grained-activation-offloading",
    "--distribute-saved-activations", "--fim-data", "--freeze-all-layers",
    "--attention-backend local", "--attention-backend unfused",
    "--tp-comm-overlap", "--delay-wgrad-compute", "--use-kitchen-attention", "--yaml-cfg x.yaml",
    "--transformer-impl inference_optimized",
    "--position-embedding-type mrope", "--inprocess-restart",
    "--spec local x", "--log-max-attention-logit", "--save-activations-interval 2",
    "--save-dgrads-interval 2",
    "--openai-gelu", "--onnx-safe", "--decoder-num-layers 2", "--init-method-xavier-uniform",
    "--tensor-parallel-num-weight-shards 2", "--use-te-activation-func", "--flash-attention-version 3",
    "--symmetric-ar-type two_shot", "--perform-rl-step",
)  # fmt: skip


def not_carried(rng: random.Random, folder: Path) -> Case:
    """What Megatron has and this project does not carry."""
    flags = rng.choice(_NOT_CARRIED).split()
    return Case(" ".join(flags), flags, [flags[0]])


def shapes(rng: random.Random, folder: Path) -> Case:
    """Numbers of heads, groups, features and ranks that do not divide each other."""
    kind = rng.randrange(3)
    if kind == 0:
        groups = rng.choice([3, 5, 6, 7])
        return Case(
            f"{groups} groups of 4 heads", ["--num-query-groups", str(groups)], ["--num-query-groups"]
        )
    if kind == 1:
        ranks = rng.choice([3, 4, 5, 8])
        flag = "--tensor-model-parallel-size"
        return Case(f"{ranks} ranks of 2 groups", [flag, str(ranks)], [flag])
    width = rng.choice([4, 12, 20, 36])
    return Case(f"heads of {width} features", ["--kv-channels", str(width)], ["features"])


POLICY = """\
configs:
  four: {bits: 4, code: nf4, group: 64, scale_bits: 8, rounding: nearest}
  eight: {bits: 8, code: int, group: 64, scale_bits: 16, rounding: nearest}
  recompute: {bits: 0}
matchers:
  norm_outputs: {config: recompute, type: glob, pattern: "*.norm_output", enabled: true}
  activation_output: {config: recompute, type: glob, pattern: "*.linear_fc2.input", enabled: true}
  attention: {config: eight, type: glob, pattern: "*.core_attention.*", enabled: true}
  default: {config: four, type: glob, pattern: "*", enabled: true}
"""

# what is broken: (what is replaced, by one of these, what the error names, whether its line is known)
_BREAKS: tuple[tuple[str, list[str], str, bool], ...] = (
    ("bits: 4", [f"bits: {b}" for b in (1, 7, 9, 12, 32, -4, "four", "4.0", "true", "null", "[4]")], "bits", True),
    ("bits: 8", [f"bits: {b}" for b in (1, 7, 11, 64, -8, "'8'", "8.5", "{}")], "bits", True),
    ("bits: 0", ["bits: 0, code: nf4", "bits: 0, group: 64"], "bits 0", True),
    ("bits: 0", ["bits: 4", "bits: 8"], "rebuilt", True),
    ("bits: 0", ["bit: 0", "Bits: 0", "width: 0"], "bits", True),
    ("group: 64, scale_bits: 8", [f"group: {g}, scale_bits: 8" for g in (0, 16, 48, 63, 512, -64, "all")], "group", True),
    ("scale_bits: 8", [f"scale_bits: {s}" for s in (4, 12, 32, -8, "bf16", "8.0")], "scale", True),
    ("code: nf4", [f"code: {c}" for c in ("nf5", "NF4", "fp4", "int8", "[]", "4")], "code", True),
    ("code: int,", ["code: nf4,", "code: e2m1,", "code: cubic,"], "bits only", True),
    ("rounding: nearest}\n  eight", ["rounding: up}\n  eight", "rounding: random}\n  eight"], "rounding", True),
    ("code: nf4", ["cod: nf4", "Code: nf4", "format: nf4"], "unknown key", True),
    ("group: 64, scale_bits: 8", ["groups: 64, scale_bits: 8", "block: 64, scale_bits: 8"], "unknown key", True),
    ("config: four", ["config: fuor", "config: 4", "config: default", "config: null", "config: [four]"], "config", True),
    ("config: eight", ["config: eigth", "config: sixteen", "config: recompute"], "attention", True),
    ("type: glob, pattern: \"*\"", ["type: regex, pattern: \"*\"", "type: Glob, pattern: \"*\""], "type", True),
    ("pattern: \"*\"", ["pattern: \"*.query\"", "pattern: \"decoder.layers.0.*\""], "no matcher takes", False),
    ("pattern: \"*\"", ["pattern: 5", "pattern: [\"*\"]", "pattern: null", "pattern: true"], "pattern", True),
    ("*.core_attention.*", ["*.core_atention.*", "*.attention.*", "*.softmax.*", "layers.0.*", "decoder.layers.77.*"], "attention", True),
    ("*.norm_output", ["*.norm_outputs", "*.layernorm.*", "norm_output"], "norm_outputs", True),
    ("enabled: true}\n  default", [f"enabled: {e}}}\n  default" for e in ("1", "'true'", "maybe", "null")], "enabled", True),
    (", enabled: true}\n  default", ["}\n  default", ", enable: true}\n  default"], "enabled", True),
    ("pattern: \"*.core_attention.*\", ", ["", "patern: \"*.core_attention.*\", "], "pattern", True),
    ("config: eight, ", ["", "confg: eight, "], "config", True),
    ("configs:", ["config:", "Configs:", "formats:"], "configs", False),
    ("matchers:", ["matcher:", "rules:"], "matchers", False),
    ("matchers:", ["version: 2\nmatchers:", "default: four\nmatchers:"], "unknown top-level", True),
    ("  eight: {", ["  four: {"], "four", True),
    ("  attention: {", ["  norm_outputs: {", "  activation_output: {"], "twice", True),
    ("configs:\n", ["configs:\n\tfour: {bits: 4}\n", "configs: [\n", "configs: {\n", "configs:\n  - four\n"], "YAML", False),
    (POLICY, ["", "[]", "4", "configs: {}\nmatchers: {}\n", "null", "configs:\nmatchers:\n", "- a\n- b\n"], "--agoq-activations", False),
    ("{bits: 0}", ["!!python/object:os.system {bits: 0}", "!recompute {bits: 0}", "*anchor", "[0]", "0", "null"], "", False),
)  # fmt: skip


def _break(old: str, new: str, names: str, located: bool) -> tuple[str, str, list[str]]:
    """What is broken, the file's text, what the error must hold."""
    at = POLICY.index(old)
    text = POLICY[:at] + new + POLICY[at + len(old) :]
    words = ["--agoq-activations", names]
    if located:
        broken = next(
            i for i, (a, b) in enumerate(zip(POLICY.split("\n"), text.split("\n"), strict=False)) if a != b
        )
        words.append(f"line {broken + 1}")
    what = f"policy: {old if len(old) < 40 else 'all'!r} -> {new!r}".replace("\n", " ")
    return what, text, words


BROKEN_POLICIES = [[_break(old, new, *wanted) for new in news] for old, news, *wanted in _BREAKS]
"""By what is broken, each way to break it: (in words, the file's text, what the error holds)."""


def broken_policy(rng: random.Random, folder: Path) -> Case:
    """A good policy file in which one thing is broken."""
    if rng.random() < 0.05:
        path = folder / f"bytes{rng.randrange(10**9)}.yaml"
        path.write_bytes(rng.randbytes(200))
        return Case("a policy of random bytes", ["--agoq-activations", str(path)], ["--agoq-activations"])
    if rng.random() < 0.05:
        path = rng.choice([folder, folder / "none.yaml", "/dev/null", "agoq.yaml"])
        return Case(f"policy {path}", ["--agoq-activations", str(path)], ["--agoq-activations"])
    what, text, words = rng.choice(rng.choice(BROKEN_POLICIES))
    path = folder / f"policy{rng.randrange(10**9)}.yaml"
    path.write_text(text)
    return Case(what, ["--agoq-activations", str(path)], words)


KINDS: tuple[tuple[Callable[[random.Random, Path], Case], int], ...] = (
    (wrong_value, 3), (no_value, 1), (misspelt, 1), (out_of_range, 3), (not_together, 5), (not_carried, 5),
    (shapes, 2), (broken_policy, 10),
)  # fmt: skip
"""Kinds of cases, each with its share."""


def cases(folder: Path, seed: int, count: int) -> Iterator[Case]:
    """So many different cases."""
    rng = random.Random(seed)
    seen: set[str] = set()
    kinds, shares = zip(*KINDS, strict=True)
    while len(seen) < count:
        case = rng.choices(kinds, shares)[0](rng, folder)
        if case.what not in seen:
            seen.add(case.what)
            yield case


def _guard(rank: int) -> None:
    """In the run: leave where it would begin to talk to other ranks, which is before a GPU is touched."""
    import os

    import torch.distributed as dist

    def started(*_, **__):
        os._exit(STARTED)

    dist.init_process_group = started


def refusals(folder: Path, seed: int, count: int) -> Iterator[Answer]:
    """Run cases, and look at how each was refused."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases(folder, seed, count):
        model = [flag for flag in MODEL if flag not in case.without]
        start = time.monotonic()
        flags = [
            *model,
            *(() if "--train-iters" in " ".join(case.flags) else ("--train-iters", "2")),
            *case.flags,
        ]
        run = runs.run(folder / "run", 1, flags, inject=_guard, timeout=60)
        errors = re.findall(r"^pretrain_gpt_agoq\.py: error: (.*)$", run.log, re.MULTILINE)
        answer = Answer(case, run.codes[0], errors[-1] if errors else "", seconds=time.monotonic() - start)
        conditions = [
            (run.codes == [2], f"exit {run.codes}: {run.log[-700:]}"),
            (len(errors) == 1, f"{len(errors)} errors"),
            ("Traceback" not in run.log, "a traceback"),
            (bool(errors) and run.log.rstrip().endswith(errors[-1]), "something follows the error"),
        ]
        conditions += [(name in answer.error, f"the error does not name {name!r}") for name in case.names]
        answer.problems = [text for holds, text in conditions if not holds]
        yield answer


if __name__ == "__main__":
    sys.exit("run throw_faults.py --only bad-input")
