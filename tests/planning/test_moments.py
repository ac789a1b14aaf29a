"""The planner's worst moment of a step against what really lives between its operations.

Run as a script, this file trains each configuration for two iterations and counts, in the second one's
forward and backward passes, the bytes of all storages that operations have made and that still live.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from forked_ranks import fork_ranks, import_megatron
from launch import covering
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# LLaMA-3-8B's ratios; so many tokens that weights and their gradients count for little; no rotary tables,
# which are large beside so narrow layers.
MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 448 --num-attention-heads 8 --num-query-groups 2
    --kv-channels 16 --group-query-attention --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type none --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --seq-length 2048 --max-position-embeddings 4096 --micro-batch-size 1
    --global-batch-size 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 63 --train-iters 2
    --make-vocab-size-divisible-by 64 --lr 1e-4 --bf16 --eval-iters 0 --eval-interval 1000 --num-workers 0
    --use-distributed-optimizer --no-agoq-check-gradients
""".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"
BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
FP8 = "--fp8-format hybrid --fp8-recipe tensorwise"
PARTS = "--mlp-chunks-for-training 4"
GELU = "GELU"
"""Takes --swiglu out of the model's flags."""
LATENTS = """LATENTS --multi-latent-attention --qk-layernorm --kv-lora-rank 64 --qk-head-dim 16
    --qk-pos-emb-head-dim 8 --v-head-dim 16 --rope-type rope"""
"""Takes --group-query-attention out of the model's flags. Of DeepSeek-V2-Lite's ratios."""
CHECKED = "CHECKED --seq-length 2048 --train-iters 4"
"""With the check of gradients, in the iteration that looks at the last layer, whose backward pass is first.
Such short sequences it takes whole."""
TWO = "--context-parallel-size 2 --seq-length 4096 --kv-channels 32 --cp-comm-type"
"""Sequences over two ranks, each with as many tokens as elsewhere; the rank with the larger peak counts. With
heads exchanged for tokens an attention's forward pass is the worst moment of `agoq`, where a CPU's quantizer
has numbers in FP32 that a GPU's kernel has not."""
RUNS = {
    "off": "--agoq-activations off",
    "off, MLP in parts": f"--agoq-activations off {PARTS}",
    "off, full recomputation": f"--agoq-activations off {FULL} 1",
    "agoq": "",
    "agoq, MLP in parts": PARTS,
    "agoq, full recomputation": f"{FULL} 1",
    "agoq, full recomputation, MLP in parts": f"{FULL} 1 {PARTS}",
    "agoq, full recomputation of two layers": f"{FULL} 2",
    "off, recomputation of one layer": f"--agoq-activations off {BLOCK} 1",
    "agoq, recomputation of one layer": f"{BLOCK} 1",
    "agoq, recomputation of three layers, MLP in parts": f"{BLOCK} 3 {PARTS}",
    "uniform4, full recomputation, MLP in parts": f"--agoq-activations uniform4 {FULL} 1 {PARTS}",
    "off, two layers, MLP run again": f"--agoq-activations off --num-layers 2 {SELECTIVE} mlp",
    "agoq, MLP run again": f"{SELECTIVE} mlp",
    "agoq, MLP run again, which cancels its parts": f"{SELECTIVE} mlp {PARTS}",
    "off, attention run again": f"--agoq-activations off {SELECTIVE} core_attn",
    "agoq, attention run again": f"{SELECTIVE} core_attn",
    "agoq, attention run again, MLP in parts": f"{SELECTIVE} core_attn {PARTS}",
    "agoq, attention and MLP run again": f"{SELECTIVE} core_attn mlp",
    "off, two layers, GELU": f"--agoq-activations off --num-layers 2 {GELU}",
    "off, norms of heads": "--agoq-activations off --qk-layernorm",
    "agoq, norms of heads": "--qk-layernorm",
    "off, gates": "--agoq-activations off --attention-output-gate",
    "agoq, gates": "--attention-output-gate",
    "off, latents": f"--agoq-activations off {LATENTS}",
    "agoq, latents": LATENTS,
    "agoq, latents, q-LoRA": f"{LATENTS} --q-lora-rank 64",
    "agoq, latents, full recomputation": f"{LATENTS} {FULL} 1",
    "agoq, GELU": GELU,
    "off, FP8": f"--agoq-activations off {FP8}",
    "agoq, FP8": FP8,
    "agoq, FP8, weights held": f"{FP8} --global-batch-size 2",
    "agoq, FP8, full recomputation": f"{FP8} {FULL} 1",
    "agoq, FP8, MLP run again": f"{FP8} {SELECTIVE} mlp",
    "agoq, FP8, MLP in parts": f"{FP8} {PARTS}",
    "agoq, FP8, GELU": f"{FP8} {GELU}",
    "agoq, FP8, checked": f"{CHECKED} {FP8}",
    "agoq, squared ReLU": f"{GELU} --squared-relu",
    "agoq, zero-centred, MLP in parts": f"--apply-layernorm-1p {PARTS}",
    "agoq, GELU, MLP in parts": f"{GELU} {PARTS}",
    "agoq, GELU, full recomputation": f"{GELU} {FULL} 1",
    "off, two tokens more": "--agoq-activations off --mtp-num-layers 2",
    "agoq, two tokens more": "--mtp-num-layers 2",
    "agoq, two tokens more, many words": "--mtp-num-layers 2 --vocab-size 1023",
    "agoq, two tokens more, full recomputation": f"--mtp-num-layers 2 {FULL} 1",
    "agoq, two tokens more, MLP run again": f"--mtp-num-layers 2 {SELECTIVE} mlp",
    "off, ring": f"--agoq-activations off {TWO} p2p",
    "agoq, ring": f"{TWO} p2p",
    "agoq, ring, 8-bit gradients": f"{TWO} p2p --agoq-context-grad-bits 8",
    "agoq, ring, full recomputation": f"{TWO} p2p {FULL} 1",
    "agoq, ring, norms of heads": f"{TWO} p2p --qk-layernorm",
    "off, gathered keys": f"--agoq-activations off {TWO} all_gather",
    "agoq, gathered keys": f"{TWO} all_gather",
    "off, heads for tokens": f"--agoq-activations off {TWO} a2a",
    "agoq, checked": CHECKED,
    "agoq, checked, long sequence": CHECKED.replace("2048", "4096"),
    "agoq, checked, full recomputation": f"{CHECKED} {FULL} 1",
    "agoq, checked, MLP run again": f"{CHECKED} {SELECTIVE} mlp",
    "agoq, checked, attention run again": f"{CHECKED} {SELECTIVE} core_attn",
    "agoq, checked, latents": f"{CHECKED} {LATENTS}",
    "agoq, checked, gates": f"{CHECKED} --attention-output-gate",
    "agoq, checked, GELU": f"{CHECKED} {GELU}",
}
ALWAYS = {
    "off", "agoq", "agoq, MLP in parts", "agoq, full recomputation, MLP in parts",
    "agoq, full recomputation of two layers", "off, two layers, MLP run again",
    "off, two layers, GELU", "agoq, two tokens more, full recomputation", "agoq, FP8, weights held",
}  # fmt: skip


class Live(TorchDispatchMode):
    """Bytes of the storages that operations under it have made and that live, after each operation."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_iter((args, kwargs)) if torch.is_tensor(t)}
        for tensor in tree_iter(result):
            if torch.is_tensor(tensor) and (ref := StorageWeakRef(tensor.untyped_storage())) not in given:
                self._sizes[ref] = tensor.untyped_storage().nbytes()
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result


def measure(flags: str, out: Path) -> None:
    """On a rank: train, and write the measured and the planned bytes."""
    import megatron.training.training as megatron
    from megatron.training import get_args

    from agoq_megatron.entries import training
    from agoq_megatron.model.transformer_config import transformer_config_from_args
    from agoq_megatron.planning import footprint
    from agoq_megatron.seams import cpu

    live, calls, stock = Live(), [], megatron.get_forward_backward_func
    checked = "CHECKED" in flags

    def counted(*arguments, **named):
        run = stock(*arguments, **named)

        def passes(*arguments, **named):
            calls.append(None)
            if len(calls) != (4 if checked else 2):  # the first one's hooks are the project's own meter
                return run(*arguments, **named)
            with live:
                return run(*arguments, **named)

        return passes

    megatron.get_forward_backward_func = counted
    without = {GELU: "--swiglu", "LATENTS": "--group-query-attention", "CHECKED": "--no-agoq-check-gradients"}
    model = [flag for flag in MODEL if flag not in [out for word, out in without.items() if word in flags]]
    given = [flag for flag in flags.split() if flag not in (GELU, "CHECKED", "LATENTS")]
    sys.argv = ["pretrain_gpt_agoq.py", *model, *given]
    cpu.install()
    training.main(on_cpu=True)
    args = get_args()
    footprint.workspace_of_attention = lambda config, numel: 0.0  # a GPU's, which no tensor here holds
    (row,) = footprint.footprints(args, transformer_config_from_args(args))
    names = "saved activations", "logits", "transients", "gradient check", "weights in FP8"
    parts = {name: row.parts[name] for name in names}
    if args.rank:
        out = out.with_name(f"{out.name}.{args.rank}")
    out.write_text(json.dumps([live.peak, sum(parts.values()) - footprint.WORKSPACE]))


@pytest.fixture(scope="module")
def moments(launcher, tmp_path_factory, request) -> Path:
    folder = tmp_path_factory.mktemp("moments")
    everything = request.config.getoption("--exhaustive")
    launcher.script(__file__, folder, *(name for name in RUNS if everything or name in ALWAYS), timeout=900)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(950)  # the first one waits for all runs
@pytest.mark.parametrize("name", covering(RUNS, ALWAYS))
def test_worst_moment(moments, name):
    found = [json.loads(path.read_text()) for path in moments.glob(f"{name}.json*")]
    measured, planned = max(found)
    unit = 2 * 2048 * 128
    print(f"{name}: planned {planned / unit:.2f}U, lived {measured / unit:.2f}U")
    assert planned == pytest.approx(measured, rel=0.03)


if __name__ == "__main__":
    import_megatron()
    where = Path(sys.argv[1])
    for label in sys.argv[2:]:
        ranks = 2 if TWO in RUNS[label] else 1
        fork_ranks(ranks, partial(measure, RUNS[label], where / f"{label}.json"), where / f"logs {label}")
