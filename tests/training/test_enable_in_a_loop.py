"""``agoq_megatron.enable`` around a whole loop that is not ours: Megatron's own, with its builder, DDP and
optimizer. It trains as our entry point does, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import ROOT, TINY, covering

pytestmark = pytest.mark.slow

STOCK = Path(__file__).with_name("stock_entry.py")
EXAMPLE = ROOT / "scripts" / "examples" / "train_plain.py"
STEPS = 4

SP = "--tensor-model-parallel-size 2 --sequence-parallel"
PP = "--pipeline-model-parallel-size 2 --num-layers 4"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 40000"
GATHERED = f"{SHARDED} --overlap-param-gather"
ALL = {"grad_bits": 8, "optimizer_bits": 8, "rounding": "stochastic"}
# what is run: (ranks, Megatron's flags, keywords of enable())
RUNS = {
    "one rank, all three": (1, SHARDED, ALL),
    "one rank, activations alone": (1, "", {"rounding": "stochastic"}),
    "one rank, full recomputation": (1, f"{FULL} {SHARDED}", ALL),
    "TP2 SP, normed heads": (2, f"{SP} --qk-layernorm {SHARDED}", ALL),
    "PP2, tied embeddings": (2, f"{PP} {SHARDED}", ALL),
    "PP2 interleaved": (2, f"{PP} --num-layers-per-virtual-pipeline-stage 1 {SHARDED}", ALL),
    "DP2": (2, GATHERED, ALL),
    "DP2, gradients alone": (2, "", {"activations": "off", "grad_bits": 8}),
    "a token more": (1, f"--mtp-num-layers 1 {SHARDED}", ALL),
    "FP32, all off": (1, "", {"activations": "off"}),
}  # fmt: skip


def flags_of(enabled: dict) -> list[str]:
    return [word for k, v in enabled.items() for word in (f"--agoq-{k.replace('_', '-')}", str(v))]


@pytest.mark.supports("agoq_megatron.enable()", part="activations")
@pytest.mark.supports("agoq_megatron.enable()", part="gradients")
@pytest.mark.supports("agoq_megatron.enable()", part="states")
@pytest.mark.parametrize("case", covering(RUNS, {"TP2 SP, normed heads", "DP2", "PP2, tied embeddings"}))
def test_trains_as_our_entry_point_does(launcher, tmp_path, seed, case):
    ranks, flags, enabled = RUNS[case]
    left = {"--bf16"} if case.startswith("FP32") else set()
    left |= {"--untie-embeddings-and-output-weights"} if "tied" in case else set()
    flags = [
        *(w for w in TINY if w not in left),
        *flags.split(),
        "--seed",
        seed % 10000 + 1,
        "--train-iters",
        STEPS,
    ]
    path = tmp_path / "stock.json"
    run = launcher.run(
        *flags, tiny=False, ranks=ranks, entry=STOCK,
        env={"STOCK_REPORT": str(path), "AGOQ_ENABLE": json.dumps(enabled)},
    )  # fmt: skip
    assert run.ok, run.log[-4000:]
    ours = launcher.run(*flags, *flags_of(enabled), tiny=False, ranks=ranks)
    assert ours.ok, ours.log[-4000:]
    history = json.loads(path.read_text())
    assert {int(i): loss for i, (loss, _) in history.items()} == ours.losses()
    assert {int(i): norm for i, (_, norm) in history.items()} == ours.grad_norms()


def test_a_resumed_run_is_the_uninterrupted_one(launcher, tmp_path, seed):
    """Megatron's own checkpoints hold gradients' and states' formats none: FP32, under its names."""
    flags = [*TINY, *SHARDED.split(), "--seed", seed % 10000 + 1, "--train-iters", STEPS]
    flags += ["--save", tmp_path, "--save-interval", STEPS // 2]
    histories = []
    for more in ((), ("--load", tmp_path, "--ckpt-step", STEPS // 2)):
        path = tmp_path / "stock.json"
        env = {"STOCK_REPORT": str(path), "AGOQ_ENABLE": json.dumps(ALL)}
        run = launcher.run(*flags, *more, tiny=False, entry=STOCK, env=env)
        assert run.ok, run.log[-4000:]
        histories.append(json.loads(path.read_text()))
    whole, rest = histories
    assert rest == {i: whole[i] for i in map(str, range(STEPS // 2 + 1, STEPS + 1))}


def test_the_example_trains(launcher, tmp_path):
    """As it stands, but that there is no GPU."""
    runner = tmp_path / "runner.py"
    runner.write_text(
        "import runpy\nfrom agoq_megatron.seams import compat, cpu\ncompat.silence_missing_accelerators()\n"
        f"cpu.install()\nrunpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    assert len(EXAMPLE.read_text().splitlines()) <= 60 and "megatron.training" not in EXAMPLE.read_text()
    run = launcher.run("24", ranks=2, tiny=False, entry=runner)
    assert run.ok, run.log[-4000:]
    losses = [float(line.split()[-1]) for line in run.log.splitlines() if line.startswith("rank 0 step")]
    assert len(losses) == 24 and losses[0] > 4 and losses[-1] < 0.5
