"""The planner's numbers against what runs report and what was measured.

Run as a script, this file plans; what makes Megatron run on a CPU changes a process for good.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launch import run_planner

M = 2**20
SHARDED = "--use-distributed-optimizer"
GPT = (
    "--num-layers 4 --hidden-size 96 --num-attention-heads 4 --seq-length 48 --max-position-embeddings 48 "
    "--attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --bf16 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --eval-iters 0 --eval-interval 1000 "
    "--num-workers 0 --normalization LayerNorm --ffn-hidden-size 224 --position-embedding-type "
    "learned_absolute --log-interval 1 --agoq-activations off"
)
# name: (ranks, whether on the launcher's tiny model, flags)
RUNS = {
    "FP32 everything": (1, True, ""),
    "TP2, sequence parallel, 8 bits": (
        2, True, f"--tensor-model-parallel-size 2 --sequence-parallel {SHARDED} --agoq-grad-bits 8 "
        "--agoq-optimizer-bits 8",
    ),
    "TP2, sequence parallel, latents, 8 bits": (
        2, False, f"{GPT} --tensor-model-parallel-size 2 --sequence-parallel {SHARDED} --agoq-grad-bits 8 "
        "--agoq-optimizer-bits 8 --multi-latent-attention --qk-layernorm --q-lora-rank 256 "
        "--kv-lora-rank 192",
    ),
    "PP2, LayerNorm, biases, tied": (2, False, f"{GPT} --pipeline-model-parallel-size 2"),
    "PP2, two tokens more": (
        2, True, "--pipeline-model-parallel-size 2 --mtp-num-layers 2 --agoq-activations off",
    ),
    "DP2, split masters, BF16 gradients": (
        2, True, f"{SHARDED} --agoq-master-weights split --agoq-grad-bits 16",
    ),
    "interleaved PP2, 8 bits": (
        2, True, "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 "
        f"{SHARDED} --agoq-grad-bits 8 --agoq-optimizer-bits 8",
    ),
}  # fmt: skip

# One H100 80GB, scripts/bench/bench_step.py; docs/performance.md names the raw results. (model, flags, MiB)
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
CHECKED = "CHECKED"  # with the check of gradients, which all others were measured without
CODES_ALONE = "--agoq-grad-bits 8 --agoq-grad-residual-bits 0"  # the default when most of this was measured
MEASURED = {
    "off": ("llama3-8b", "--agoq-activations off", 53577),
    "agoq": ("llama3-8b", "", 39838),
    "agoq, checked": ("llama3-8b", CHECKED, 40006),
    "8-bit gradients": ("llama3-8b", CODES_ALONE, 34183),
    "residual": ("llama3-8b", "--agoq-grad-bits 8", 35363),
    "8-bit gradients and states": ("llama3-8b", f"{CODES_ALONE} --agoq-optimizer-bits 8", 19733),
    "7B, off": ("llama2-7b", "--agoq-activations off", 50457),
    "7B, agoq": ("llama2-7b", "", 38068),
    "13B, off": ("llama2-13b", "--agoq-activations off", 71673),
    "13B, agoq": ("llama2-13b", "", 56147),
    "32k, off, full recomputation": (
        "llama3-8b", f"--agoq-activations off --seq-length 32768 --micro-batch-size 1 {FULL}", 43881,
    ),
    "32k, agoq, MLP in parts": (
        "llama3-8b", "--seq-length 32768 --micro-batch-size 1 --mlp-chunks-for-training 4", 44975,
    ),
    "32k, agoq, MLP and loss in parts": (
        "llama3-8b", "--seq-length 32768 --micro-batch-size 1 --mlp-chunks-for-training 4 "
        "--agoq-loss-chunks 8", 43672,
    ),
    "32k, agoq, MLP in 3 parts, loss in 4": (
        "llama3-8b", "--seq-length 32768 --micro-batch-size 1 --mlp-chunks-for-training 3 "
        "--agoq-loss-chunks 4", 43672,
    ),
    "32k, agoq, MLP in 2 parts, loss in 4": (
        "llama3-8b", "--seq-length 32768 --micro-batch-size 1 --mlp-chunks-for-training 2 "
        "--agoq-loss-chunks 4", 43878,
    ),
    "longest sequence": (
        "llama3-8b", "--seq-length 125440 --max-position-embeddings 125440 --micro-batch-size 1", 77212,
    ),
    "LLaMA-3-8B whole, all in 8 bits": (
        "llama3-8b", "--num-layers 32 --vocab-size 128256 --micro-batch-size 1 --agoq-loss-chunks 8 "
        f"{CODES_ALONE} --agoq-optimizer-bits 8", 63306,
    ),
}  # fmt: skip

# Two H100 80GB, scripts/bench/bench_gpus.py: (layout, row): MiB of each pipeline stage.
ON_TWO_GPUS = {
    ("dp", "bf16"): [27987],
    ("dp", "ag"): [18896],
    ("dp", "ago"): [11670],
    ("pp", "bf16"): [23204, 21286],
    ("pp", "bf16_full"): [18623, 18623],
    ("pp", "a"): [18951, 19027],
    ("pp", "ag"): [16228, 16186],
    ("pp", "ago"): [9374, 8589],
    ("tp", "bf16_full"): [19886],
    ("tp", "a"): [20222],
    ("tp", "ago"): [10156],
    ("table8", "bf16"): [40730],
    ("table8", "ago"): [15731],
}

# Of 8-bit gradients: (GPUs, flags, bytes that a reduction holds for each number of a bucket)
CODED = 70 / 64
LARGE = "--preset llama3-8b --global-batch-size 64 --agoq-grad-bits 8 --ddp-bucket-size 1000"
REDUCTIONS = {
    "in one node": (8, "", CODED),
    "two nodes of 8": (16, "", 2 * CODED + 2 * 2 / 8),
    "in one hop by flag": (16, "--agoq-grad-reduce flat", CODED),
    "nodes of 4 by flag": (8, "--agoq-grad-node-size 4", 2 * CODED + 2 * 2 / 4),
    "TP4, two of a node": (16, "--tensor-model-parallel-size 4", 2 * CODED + 2 * 2 / 2),
    "TP8, one of a node": (32, "--tensor-model-parallel-size 8", CODED),
    "stages between": (
        32, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --use-tp-pp-dp-mapping", CODED,
    ),
}  # fmt: skip

EMPTY = (
    "--num-layers 4 --pipeline-model-parallel-size 6 --account-for-embedding-in-pipeline-split "
    "--account-for-loss-in-pipeline-split"
)
WITHOUT_LAYERS = {  # the first and the last stage
    "nothing again": EMPTY,
    "all again": f"{EMPTY} {FULL}",
    "one layer again": f"{EMPTY} {FULL.replace('uniform', 'block')}",
}


def measured_flags(model: str, more: str) -> list[str]:
    import bench_step

    shape = dict(zip(bench_step.SHAPE, bench_step.MODELS[model], strict=True))
    flags = [text for key, value in shape.items() for text in (f"--{key}", str(value))]
    batch = 1 if "micro-batch-size 1" in more else 4
    return [
        *bench_step.COMMON_FLAGS, *bench_step.MOCK_DATA, *flags, "--max-position-embeddings", "32768",
        "--train-iters", "10", "--global-batch-size", str(2 * batch),
        *more.replace(CHECKED, "").split(), *([] if CHECKED in more else ["--no-agoq-check-gradients"]),
    ]  # fmt: skip


def flags_on_two_gpus(layout: str, row: str) -> list[str]:
    import bench_gpus
    import bench_step

    shape, rows, flags = bench_gpus.layouts(2, tiny=False)[layout]
    measured = rows[row].replace("--agoq-grad-bits 8", CODES_ALONE)
    run = ["--nproc-per-node", "2", *shape, "--run", f"{row}={measured}", "--logs", "."]
    args = bench_step.parse_arguments([*run, "--", *flags.split()])
    command = bench_step.build_command(args, row, row, args.shape, iterations=10)
    flags = command[command.index(str(bench_step.ROOT / "pretrain_gpt_agoq.py")) + 1 :]
    return [*flags, "--no-agoq-check-gradients"]


def plan_all(tiny: list[str]) -> dict:
    """In the script: stages' parts of every run, and of everything that was measured."""
    from agoq_megatron.seams import compat, cpu

    compat.silence_missing_accelerators()
    cpu.install()
    from agoq_megatron import plan

    def stages(ranks: int, flags: list[str]) -> list[dict]:
        _, args = plan.parse(["--gpus", str(ranks), *flags])
        planner = plan.Planner(args)
        mine = next(iter(planner.kinds().values()))
        return [row.parts for row in planner.footprints(**mine)]

    found = {
        name: stages(ranks, [*(tiny if small else []), "--train-iters", "2", *flags.split()])
        for name, (ranks, small, flags) in RUNS.items()
    }
    return found | {
        name: stages(1, measured_flags(model, more)) for name, (model, more, _) in MEASURED.items()
    } | {
        "-".join(run): stages(2, flags_on_two_gpus(*run)) for run in ON_TWO_GPUS
    } | {
        name: stages(gpus, [*LARGE.split(), *flags.split()]) for name, (gpus, flags, _) in REDUCTIONS.items()
    } | {
        name: stages(6, [*tiny, "--train-iters", "2", *flags.split()])
        for name, flags in WITHOUT_LAYERS.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def planned(tmp_path_factory, launcher) -> dict:
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    launcher.script(__file__, out, *launcher.tiny, timeout=200)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_gradients_and_optimizer(planned, launcher, name):
    """The last rank's bytes, as the run reports them: the optimizer's to the byte, but that what is sharded
    is not cut evenly; gradients but for what fills up blocks and buckets."""
    ranks, small, flags = RUNS[name]
    run = launcher.run(*flags.split(), "--train-iters", "2", ranks=ranks, tiny=small)
    assert run.ok, run.log[-4000:]
    parts = planned[name][-1]
    assert parts["optimizer"] == pytest.approx(run.report["optimizer_bytes"], rel=0.01)
    assert parts["gradients"] == pytest.approx(run.report["gradient_bytes"], rel=0.01)


def test_inputs_of_stages(planned):
    """Interleaved PP2, counted from the order of events: a hidden state of every micro-batch between its
    forward and its backward, but in the model's first chunk, which reads tokens."""
    from agoq_megatron.planning.in_flight import Schedule

    hidden = 64 * 128 * 2  # of the tiny model, in bytes
    for stage, parts in enumerate(planned["interleaved PP2, 8 bits"]):
        held = peak = 0
        # Two ranks, all of them stages; 4 micro-batches.
        for is_forward, chunk in Schedule(2, 4, 2).events(stage):
            held += (1 if is_forward else -1) * ((stage, chunk) != (0, 0))
            peak = max(peak, held)
        assert peak > 0 and parts["inputs of stages"] == peak * hidden, stage
    first, second = planned["PP2, LayerNorm, biases, tied"]  # 4 micro-batches of 2 sequences of 48 tokens
    assert (first["inputs of stages"], second["inputs of stages"]) == (0, 2 * 48 * 96 * 2)


@pytest.mark.parametrize("name", MEASURED)
def test_measured_peaks(planned, name):
    peak = sum(planned[name][0].values()) / M
    print(f"{name}: predicted {peak:.0f}, measured {MEASURED[name][2]} MiB")
    assert peak == pytest.approx(MEASURED[name][2], rel=0.03)


def test_the_check_of_gradients(planned):
    """On a GPU it took 168.0 MiB more, where one layer of the eight is looked at in an iteration."""
    with_it, without = (sum(planned[name][0].values()) / M for name in ("agoq, checked", "agoq"))
    assert with_it - without == pytest.approx(40006.0 - 39838.0, rel=0.01)


@pytest.mark.parametrize("run", ON_TWO_GPUS, ids="-".join)
def test_measured_peaks_on_two_gpus(planned, run):
    peaks = [sum(parts.values()) / M for parts in planned["-".join(run)]]
    shown = " and ".join(f"{peak:.0f}" for peak in peaks)
    print(f"two GPUs, {' '.join(run)}: predicted {shown}, measured {ON_TWO_GPUS[run]} MiB")
    assert peaks == pytest.approx(ON_TWO_GPUS[run], rel=0.03)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(planned, name):
    _, flags, each = REDUCTIONS[name]
    tp = int(flags.split()[1]) if "tensor" in flags else 1
    assert planned[name][0]["reduction"] == pytest.approx(each * (1000 + 128256 * 4096 / tp))


@pytest.mark.parametrize("name", WITHOUT_LAYERS)
def test_stages_without_layers(planned, name):
    first, second, *_, last = planned[name]
    assert first["saved activations"] == last["saved activations"] == 0 < second["saved activations"]
    assert first["transients"] < second["transients"] and last["logits"] > 0


@pytest.mark.slow
def test_a_large_run(tmp_path):
    """LLaMA-3 70B on 64 GPUs, 405B on 1,024: numbers that anybody can check by hand."""
    out, figure = tmp_path / "plan.json", tmp_path / "plan.png"
    flags = "--gpus 64 --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 "
    flags += "--num-layers-per-virtual-pipeline-stage 10 --global-batch-size 256"
    run = run_planner("--preset", "llama3-70b", *flags.split(), "--plan-json", out, "--plan-png", figure)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(out.read_text())
    plain = report["kinds"]["BF16"]["stages"]
    assert [stage["in_flight"] for stage in plain] == [11, 9, 7, 5]
    assert sum(stage["parameters"] for stage in plain) * 8 == pytest.approx(70.6e9, rel=0.01)
    first = plain[0]["parts"]
    assert first["weights"] == pytest.approx(2 * plain[0]["parameters"])
    assert first["optimizer"] == pytest.approx(12 / 2 * plain[0]["parameters"])
    # 17U of a token and layer in exact form; U is cut by the eight tensor-parallel ranks.
    assert first["saved activations"] == pytest.approx(17 * 2 * 8192 / 8 * 8192 * 10 * 11, rel=0.03)
    reduced = report["kinds"]["A + G + O"]["stages"][0]["parts"]
    assert reduced["gradients"] == pytest.approx(1.594 * plain[0]["parameters"], rel=0.01)
    assert report["kinds"]["A"]["largest"]["sequence"] > 3 * report["kinds"]["BF16"]["largest"]["sequence"]
    assert figure.stat().st_size > 10_000
    assert "Side by side" in run.stdout and "all-gather of weights" in run.stdout


@pytest.mark.slow
def test_what_does_not_fit_and_bad_flags(launcher):
    flags = "--preset llama3-405b --gpus 1024 --tensor-model-parallel-size 8 --global-batch-size 1024".split()
    run = launcher.plan(*flags)
    assert run.ok and "does not fit" in run.log and "no, by" in run.log
    run = launcher.plan(*"--preset llama3-8b --gpus 8 --hybrid-layer-pattern M --global-batch-size 8".split())
    assert run.codes == [2] and "--hybrid-layer-pattern" in run.log and "Traceback" not in run.log
    run = launcher.plan("--gpu-memory", "lots")
    assert run.codes == [2] and "80GiB" in run.log


@pytest.mark.slow
def test_a_budget_of_ones_own(launcher):
    """However it is written; and other flags may say `auto`."""
    flags = "--preset llama3-8b --gpus 8 --global-batch-size 16 --tensor-model-parallel-size 8".split()
    run = launcher.plan(*flags, "--agoq-activations=auto", "--agoq-activation-memory=3GiB")
    assert run.ok and "within --agoq-activation-memory 3GiB" in run.log, run.log[-3000:]
    run = launcher.plan(*flags, "--agoq-activations", "auto", "--agoq-gpu-memory", "40GiB")
    assert run.ok and "within --agoq-gpu-memory 40GiB" in run.log, run.log[-3000:]
    run = launcher.plan(*flags, "--agoq-grad-bits", "8", "--agoq-grad-reduce", "auto")
    assert run.ok and "within --agoq" not in run.log, run.log[-3000:]
    run = launcher.plan(*flags, "--plan-json", "/no/such/place/plan.json")
    assert run.codes == [2] and "--plan-json" in run.log and "Traceback" not in run.log


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(plan_all(sys.argv[2:])))
