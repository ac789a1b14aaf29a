"""What convergence.py trains: models and runs by size, variants, and the command of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))

from quickstart import flags

ROOT = Path(__file__).resolve().parents[2]
POLICIES = Path(__file__).resolve().parent / "convergence_policies"
BUILT_IN = ("off", "agoq", "uniform4")
TAIL = {"base": 0.1, "continue": 1 / 3, "pretrained": 1 / 3, "scratch": 0.1}
"""Last part of a run over which its training loss is averaged, by phase."""
CONTINUED = ("continue", "pretrained")
"""Phases in which all runs start from one model and read new text."""

# batch: sequences a step. warmup: steps. tokens: trained on in each phase (rounded up to whole steps).
# continue_share: part of the training documents that is kept for the continued runs alone.
PRESETS = {
    # 107M parameters, 65,536 tokens a step.
    "gpu": {
        "corpus": {"max-bytes": 270_000_000, "valid-fraction": 0.02, "vocab-size": 8192},
        "continue_share": 0.43,
        "model": {
            "num-layers": 8,
            "hidden-size": 1024,
            "ffn-hidden-size": 2816,
            "num-attention-heads": 8,
            "num-query-groups": 2,
            "kv-channels": 128,
            "seq-length": 1024,
        },
        "batch": 64,
        "micro_batch": 64,
        "lr": 1e-3,
        "final_lr": 1e-4,
        "warmup": 50,
        "tokens": {"base": 42_000_000, "continue": 30_000_000, "scratch": 20_000_000},
        "loading": {"num-workers": 2},
    },
    # For tests on a CPU: seconds, and nothing to learn from the losses.
    "tiny": {
        "corpus": {"max-bytes": 1_000_000, "valid-fraction": 0.05, "vocab-size": 512},
        "continue_share": 0.4,
        "model": {
            "num-layers": 2,
            "hidden-size": 128,
            "ffn-hidden-size": 256,
            "num-attention-heads": 2,
            "num-query-groups": 1,
            "kv-channels": 64,
            "seq-length": 64,
        },
        "batch": 8,
        "micro_batch": 8,
        "lr": 2e-3,
        "final_lr": 2e-4,
        "warmup": 4,
        "tokens": {"base": 15_000, "continue": 13_000, "scratch": 10_000},
        "loading": {"num-workers": 0},
    },
}
# 176M parameters, 63M of them (2 experts of 8) used by a token.
PRESETS["experts"] = PRESETS["gpu"] | {
    "model": {
        "num-layers": 8,
        "hidden-size": 768,
        "ffn-hidden-size": 2048,
        "num-attention-heads": 6,
        "num-query-groups": 2,
        "kv-channels": 128,
        "seq-length": 1024,
        "num-experts": 8,
        "moe-ffn-hidden-size": 1024,
        "moe-router-topk": 2,
        "moe-router-load-balancing-type": "aux_loss",
        "moe-aux-loss-coeff": 1e-2,
        "moe-token-dispatcher-type": "alltoall",
    },
    "micro_batch": 32,
}

COMMON_FLAGS = """
    --bf16 --swiglu --normalization RMSNorm --norm-epsilon 1e-5 --position-embedding-type rope
    --group-query-attention --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.02
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1
    --tokenizer-type HuggingFaceTokenizer --log-interval 20 --eval-interval 1000000000
    --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable
""".split()


class ConvergenceError(Exception):
    """Something went wrong in a step; the message says in which and what to read."""


def tail_steps(phase: str, steps: int) -> int:
    """How many of a run's last steps its training loss is averaged over."""
    return max(1, round(TAIL[phase] * steps))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        phase: a key of ``TAIL``.
        variant: its name.
        seed: sets the data order, and the initial weights where there is no checkpoint.
        flags: what makes it this variant.
    """

    phase: str
    variant: str
    seed: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.phase}-{self.variant}-{self.seed}"


BASE = Run("base", "off", 1, ("--agoq-activations", "off"))


@dataclasses.dataclass(frozen=True)
class Study:
    """What all runs of a phase have in common.

    Attributes:
        out: folder of everything that is written.
        preset: key of ``PRESETS``.
        tokens: trained on in a run.
        corpus: see :func:`convergence_corpus.corpus_parts`.
        base: the base run's result, for continued runs.
        ranks: data-parallel ranks of a run, a device each.
        micro_batch: sequences of a micro-batch on a rank; None takes the preset's.
    """

    out: Path
    preset: str
    tokens: int
    corpus: dict
    base: dict | None = None
    ranks: int = 1
    micro_batch: int | None = None

    @property
    def tokens_per_step(self) -> int:
        preset = PRESETS[self.preset]
        return preset["batch"] * preset["model"]["seq-length"]

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def settings(self) -> dict:
        """What must agree for two runs to be compared."""
        return {
            "preset": self.preset,
            "tokens": self.tokens,
            "corpus": self.corpus["tokens"],
            "base": self.base and self.base["id"],
            **({} if self.ranks == 1 else {"ranks": self.ranks}),
            **({} if self.micro_batch is None else {"micro_batch": self.micro_batch}),
        }

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"


def parse_variant(text: str, preset: str | None) -> tuple[str, tuple[str, ...]]:
    """Name and flags of a variant as it stands on the command line. Without a preset there is no
    ``off_repeat``, as its micro-batch is not known."""
    name, given, more = text.partition("=")
    file = POLICIES / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
        raise ConvergenceError(f"--variants {text}: names are of letters, digits, '_' and '.'.")
    if given:
        return name, tuple(shlex.split(more))
    if name in BUILT_IN:
        return name, ("--agoq-activations", name)
    if name == "agoq_stochastic":
        return name, ("--agoq-activations", "agoq", "--agoq-rounding", "stochastic")
    if name == "off_repeat" and preset is not None:
        half = PRESETS[preset]["micro_batch"] // 2
        return name, ("--agoq-activations", "off", "--micro-batch-size", str(half))
    if file.is_file():
        return name, ("--agoq-activations", str(file))
    files = sorted(path.stem for path in POLICIES.glob("*.yaml"))
    known = ", ".join([*BUILT_IN, "agoq_stochastic", "off_repeat", *files])
    raise ConvergenceError(f"--variants {text}: known are {known}; others as NAME=FLAGS.")


def training_command(run: Run, study: Study) -> list[str]:
    """The command of one run. All amounts are given to Megatron in sequences ("samples")."""
    preset, parts = PRESETS[study.preset], study.corpus
    batch, micro_batch = preset["batch"], study.micro_batch or preset["micro_batch"] // study.ranks
    values = {
        **preset["model"],
        **preset["loading"],
        "max-position-embeddings": preset["model"]["seq-length"],
        "micro-batch-size": micro_batch,
        "global-batch-size": batch,
        # One validation, after the last step, on every validation sequence once.
        "eval-micro-batch-size": preset["micro_batch"] // study.ranks,
        "eval-global-batch-size": preset["micro_batch"],
        "eval-iters": parts["tokens"]["valid"] // preset["model"]["seq-length"] // preset["micro_batch"],
        "seed": run.seed,
        "tokenizer-model": parts["tokenizer"],
        "train-data-path": f"{parts['prefix']}_{'continue' if study.base else 'base'}",
        "valid-data-path": f"{parts['prefix']}_valid",
        # Of its own, as runs side by side would write the same files.
        "data-cache-path": study.out / "cache" / run.name,
        "agoq-report": study.out / "reports" / f"{run.name}.json",
        "lr": preset["lr"],
        "min-lr": preset["final_lr"],
        "lr-decay-style": "cosine",
        "lr-warmup-samples": preset["warmup"] * batch,
    }
    more = []
    if study.base:
        start = len(study.base["losses"])
        values |= {
            "load": study.checkpoint,
            # The base model's schedule has ended: the learning rate stays at --min-lr. (Other values
            # of --lr would make Megatron refuse the checkpoint's optimizer state.)
            "lr-decay-samples": start * batch,
            "train-samples": (start + study.steps) * batch,
            # The data of a new phase are read from their beginning, whatever was read before.
            "phase-transition-iterations": start,
        }
        # Else Megatron insists on the base model's --train-samples too.
        more = ["--override-opt-param-scheduler", "--exit-on-missing-checkpoint"]
    else:
        values |= {"train-samples": study.steps * batch}
    if run.phase == "base":
        values |= {"save": study.checkpoint, "save-interval": study.steps}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={study.ranks}"]
    command += [str(ROOT / "pretrain_gpt_agoq.py"), *COMMON_FLAGS, *flags(values)]
    return command + more + list(run.flags)


def replace_file(path: Path, content: dict) -> None:
    """Write JSON at once: an interruption leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
