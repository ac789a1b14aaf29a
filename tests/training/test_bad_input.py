"""Bad input: one paragraph that names the flag, a non-zero exit, and nothing started. (Each flag that is
refused altogether, or with 8-bit gradients or states: ``test_flag_register.py``, without a run.)"""

import re

import pytest

pytestmark = pytest.mark.slow

STARTED = re.compile(r"^training \.\.\.$", re.MULTILINE)
POLICY = """
configs:
  four: {bits: 4, code: nf4, group: 64, scale_bits: 8}
  none: {bits: 0}
matchers:
  outputs: {config: none, type: glob, pattern: "*.norm_output", enabled: true}
  activation: {config: none, type: glob, pattern: "*.linear_fc2.input", enabled: true}
  rest: {config: four, type: glob, pattern: "*", enabled: true}
"""

WITHOUT = {
    "{real}": "--mock-data",
    "{fp32}": "--bf16",
    "{bias}": "--disable-bias-linear",
}
"""Marks among the flags of a case: what the model's own flags lose."""

# what is wrong: (flags, words that the error must hold)
CASES = {
    "unknown policy": ("--agoq-activations agoq9", ["--agoq-activations", "agoq, off, uniform4, stage"]),
    "missing policy file": ("--agoq-activations /no/such.yaml", ["--agoq-activations"]),
    "corrupt YAML": ("--agoq-activations {corrupt}", ["--agoq-activations", "YAML"]),
    "YAML of something else": ("--agoq-activations {other}", ["configs", "matchers"]),
    "width out of range": ("--agoq-activations {bits7}", ["bits", "2, 3, 4, 5, 6, 8"]),
    "group out of range": ("--agoq-activations {group48}", ["group", "32, 64, 128, 256"]),
    "unknown code": ("--agoq-activations {nf5}", ["code", "nf4"]),
    "site that nothing matches": ("--agoq-activations {uncovered}", ["no matcher takes"]),
    "recomputing the impossible": ("--agoq-activations {nothing}", ["cannot be recomputed"]),
    "hidden size that a file's group does not divide": (
        "--hidden-size 144 --agoq-activations {group64}",
        ["144 features", "16 bits"],
    ),
    "auto with two": (
        "--agoq-activations auto --agoq-activation-memory 1GiB --agoq-gpu-memory 8GiB",
        ["--agoq-activation-memory", "--agoq-gpu-memory", "24GiB", "not both"],
    ),
    "a memory without auto": (
        "--agoq-activation-memory 1GiB", ["--agoq-activation-memory 1GiB", "--agoq-activations auto"]
    ),
    "documents in two ways": (
        "--reset-attention-mask --dataloader-inter-document-masking",
        ["--reset-attention-mask with --dataloader-inter-document-masking", "leave one out"],
    ),
    "sensitivities without auto": ("--agoq-sensitivities a.json", ["--agoq-sensitivities a.json: only"]),
    "no size": (
        "--agoq-activations auto --agoq-gpu-memory lots", ["--agoq-gpu-memory 'lots'", "such as 80GiB"]
    ),
    "an empty size": (
        "--agoq-activations auto --agoq-gpu-memory=", ["--agoq-gpu-memory: its value is empty"]
    ),
    "an empty budget": ("--agoq-activation-memory=", ["--agoq-activation-memory: its value is empty"]),
    "empty sensitivities": ("--agoq-sensitivities=", ["--agoq-sensitivities: its value is empty"]),
    "no sensitivities": (
        "--agoq-activations auto --agoq-gpu-memory 8GiB --agoq-sensitivities no.json",
        ["--agoq-sensitivities no.json: no such file", "agoq_megatron.calibrate"],
    ),
    "other sensitivities": (
        "--agoq-activations auto --agoq-gpu-memory 8GiB --agoq-sensitivities {corrupt}",
        ["--agoq-sensitivities", "not a readable JSON file"],
    ),
    # Two layers of 2 x 64 tokens: 384 numbers of 5.125 bits, 1152 of 3.5 and 4 of FP32 make 196,096 bytes.
    "too little memory": (
        "--agoq-activations auto --agoq-activation-memory 105KiB --micro-batch-size 2",
        ["stage 0 by 81.00 KiB (82944 bytes)", "-num-layers 1 (of 2", "or with --micro-batch-size 1"],
    ),
    "no memory": (
        "--agoq-activations auto --agoq-gpu-memory 1.5GiB",
        ["on stage 0 nothing is left", "are missing already", "--agoq-optimizer-bits 8"],
    ),
    "unknown rounding": ("--agoq-rounding up", ["--agoq-rounding"]),
    "negative seed": ("--agoq-seed -3", ["--agoq-seed"]),
    "negative interval": ("--agoq-measure-interval -1", ["--agoq-measure-interval"]),
    "negative interval of probes": ("--agoq-probe-interval -1", ["--agoq-probe-interval -1", "0"]),
    "a bound of nothing": ("--agoq-check-bound 0", ["--agoq-check-bound 0", "--no-agoq-check-gradients"]),
    "probes of no layers": (
        "--agoq-probe-interval 5 --agoq-probe-layers 0",
        ["--agoq-probe-layers 0", "1 or more"],
    ),
    "error above one": (
        "--agoq-probe-interval 5 --agoq-max-error 1.5",
        ["--agoq-max-error 1.5", "between 0 and 1"],
    ),
    "no error at all": ("--agoq-probe-interval 5 --agoq-max-error 0", ["--agoq-max-error 0"]),
    "error that nobody measures": (
        "--agoq-max-error 0.1", ["--agoq-max-error 0.1", "Add --agoq-probe-interval"],
    ),
    "probes of what is not quantized": (
        "--agoq-activations off --agoq-probe-interval 5",
        ["--agoq-probe-interval 5", "--agoq-activations off quantizes nothing"],
    ),
    "an empty place to load from": ("--load=", ["--load: its value is empty"]),
    "an empty place to save to": ("--save= --save-interval 1", ["--save: its value is empty"]),
    "report in no folder": ("--agoq-report /no/such/folder/r.json", ["--agoq-report"]),
    "unknown flag": ("--agoq-activatoins off", ["--agoq-activatoins"]),
    "missing corpus": ("{real} --data-path /no/such/corpus", ["/no/such/corpus", ".bin", "prepare_corpus"]),
    "no corpus": ("{real}", ["--data-path", "--mock-data"]),
    "width that is no whole number": ("--agoq-activations {fraction}", ["whole number", "4.0"]),
    "matcher neither on nor off": ("--agoq-activations {maybe}", ["enabled true or false"]),
    "unfused attention": ("--attention-backend unfused", ["--attention-backend"]),
    "missing tokenizer": (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /no/tokenizer {real}",
        ["--tokenizer-model"],
    ),
    "FP16 on a CPU": ("{fp32} --fp16", ["--fp16", "--bf16"]),
    "recomputed MLP with biases": (
        "{bias} --recompute-granularity selective --recompute-modules mlp",
        ["--recompute-modules mlp", "--disable-bias-linear"],
    ),
    "nodes for one hop": (
        "--agoq-grad-bits 8 --agoq-grad-reduce flat --agoq-grad-node-size 2",
        ["--agoq-grad-node-size", "flat"],
    ),
    "nodes of one rank": (
        "--agoq-grad-bits 8 --agoq-grad-reduce two-hop --agoq-grad-node-size 1",
        ["--agoq-grad-node-size 1", "2 or more"],
    ),
    "no buckets": ("--agoq-grad-bits 8 --ddp-bucket-size 0", ["--ddp-bucket-size 0"]),
    "8-bit states without distributed optimizer": (
        "--agoq-optimizer-bits 8",
        ["--agoq-optimizer-bits 8", "add --use-distributed-optimizer"],
    ),
    "split masters without distributed optimizer": (
        "--agoq-master-weights split",
        ["--agoq-master-weights split", "add --use-distributed-optimizer"],
    ),
    "rounding of states in 32 bits": ("--agoq-optimizer-rounding nearest", ["--agoq-optimizer-bits 8"]),
    "rounding of split masters": (
        "--agoq-master-weights split --use-distributed-optimizer --agoq-optimizer-rounding nearest",
        ["--agoq-optimizer-bits 8"],
    ),
    "a flag that Megatron ignores": (
        "--rampup-batch-size 1 1 8", ["--rampup-batch-size", "--step-batch-size-schedule"],
    ),
    "bits by stage of a batch that grows": (
        "--agoq-activations stage --step-batch-size-schedule 0:1",
        ["--agoq-activations stage with --step-batch-size-schedule"],
    ),
    "experts that may not run again": (
        "--num-experts 4 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ["--agoq-activations agoq", "other experts", "bits 16"],
    ),
    "weights in pieces": (
        "--tensor-parallel-num-weight-shards 2", ["--tensor-parallel-num-weight-shards 2", "pieces"],
    ),
    "recomputing a foreign module": (
        "--recompute-granularity selective --recompute-modules moe",
        ["--recompute-modules moe", "core_attn"],
    ),
    "more ranks than key/value heads": (
        "--tensor-model-parallel-size 4",
        ["--tensor-model-parallel-size", "--num-query-groups"],
    ),
    "warm-up longer than the run": ("--lr-warmup-iters 50", ["--lr-warmup-iters"]),
    "groups that do not divide the heads": ("--num-query-groups 3", ["--num-query-groups 3"]),
    "7-bit gradients": ("--agoq-grad-bits 7", ["--agoq-grad-bits", "32, 16, 8"]),
    "16-bit gradients of an FP32 model": ("{fp32} --agoq-grad-bits 16", ["--agoq-grad-bits 16", "--bf16"]),
    "16-bit gradients in FP32": (
        "--agoq-grad-bits 16 --accumulate-allreduce-grads-in-fp32",
        ["--agoq-grad-bits 16", "--accumulate-allreduce-grads-in-fp32"],
    ),
    "residual of 32-bit gradients": (
        "--agoq-grad-residual-bits 4", ["--agoq-grad-residual-bits", "--agoq-grad-bits 8"],
    ),
    "residual of 16-bit gradients": (
        "--agoq-grad-bits 16 --agoq-grad-residual-bits 4",
        ["--agoq-grad-residual-bits", "--agoq-grad-bits 8"],
    ),
    "residual of 5 bits": (
        "{eight} --agoq-grad-residual-bits 5", ["--agoq-grad-residual-bits", "0, 4"],
    ),
    "rounding of 32-bit gradients": (
        "--agoq-grad-rounding stochastic", ["--agoq-grad-rounding", "--agoq-grad-bits 8"],
    ),
    "scale of 32-bit gradients": (
        "--agoq-grad-scale least-squares", ["--agoq-grad-scale", "--agoq-grad-bits 8"],
    ),
    "code of 32-bit gradients": ("--agoq-grad-code e4m3", ["--agoq-grad-code", "--agoq-grad-bits 8"]),
    "two hops of 32-bit gradients": (
        "--agoq-grad-reduce two-hop", ["--agoq-grad-reduce", "--agoq-grad-bits 8"],
    ),
    "node size of 32-bit gradients": (
        "--agoq-grad-node-size 4", ["--agoq-grad-node-size", "--agoq-grad-bits 8"],
    ),
    "probe of 32-bit gradients": (
        "--agoq-grad-probe-interval 5", ["--agoq-grad-probe-interval", "--agoq-grad-bits 8"],
    ),
    "FP8 gradients with a residual": (
        "{eight} --agoq-grad-code e4m3 --agoq-grad-residual-bits 4",
        ["--agoq-grad-code", "-residual-bits", "e4m3 has no residual", "Leave one"],
    ),
    "no parts of the loss": ("--agoq-loss-chunks 0", ["--agoq-loss-chunks 0", "1 for the whole"]),
    "Megatron's loss in parts": (
        "--agoq-loss megatron --agoq-loss-chunks 4", ["--agoq-loss megatron", "leave one of them out"],
    ),
    "a fused loss in parts": (
        "--cross-entropy-loss-fusion --agoq-loss-chunks 4", ["--cross-entropy-loss-fusion", "whole logits"],
    ),
    "FP8 gradients rounded at random": (
        "{eight} --agoq-grad-code e4m3 --agoq-grad-rounding stochastic",
        ["--agoq-grad-code", "-rounding", "no stochastic rounding", "Leave one"],
    ),
    "least squares with a residual": (
        "{eight} --agoq-grad-scale least-squares --agoq-grad-residual-bits 4",
        ["-scale", "-residual-bits", "absmax", "Leave one"],
    ),
    "nodes of no ranks": ("{eight} --agoq-grad-node-size 0", ["--agoq-grad-node-size 0"]),
    "negative probe interval": ("{eight} --agoq-grad-probe-interval -1", ["--agoq-grad-probe-interval -1"]),
    "8 and 16 bits": ("{eight} --grad-reduce-in-bf16", ["--grad-reduce-in-bf16", "--agoq-grad-bits 8"]),
    "W&B without TensorBoard": ("--wandb-project p --wandb-exp-name n", ["--tensorboard-dir"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    texts = {
        "corrupt": "configs: [",
        "other": "a: 1\nb: 2\n",
        "bits7": POLICY.replace("bits: 4", "bits: 7"),
        "fraction": POLICY.replace("bits: 4", "bits: 4.0"),
        "maybe": POLICY.replace("enabled: true", "enabled: perhaps", 1),
        "group64": POLICY,
        "group48": POLICY.replace("group: 64", "group: 48"),
        "nf5": POLICY.replace("nf4", "nf5"),
        "uncovered": POLICY.replace('pattern: "*"', 'pattern: "*.mlp.*"'),
        "nothing": POLICY.replace("config: four, type", "config: none, type"),
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: str(folder / f"{name}.yaml") for name in texts}


@pytest.mark.parametrize("case", CASES)
def test_refused(launcher, files, case):
    from launch import TINY

    flags, words = CASES[case]
    flags = flags.replace("{eight}", "--agoq-grad-bits 8")
    model = list(TINY)
    for mark, gone in WITHOUT.items():
        if mark in flags:
            flags = flags.replace(mark, "")
            model.remove(gone)
    run = launcher.run(*model, "--train-iters", "2", *flags.format(**files).split(), tiny=False, timeout=60)
    assert run.codes == [2], run.log[-3000:]
    errors = re.findall(r"^pretrain_gpt_agoq\.py: error: (.*)$", run.log, re.MULTILINE)
    assert len(errors) == 1, run.log[-3000:]
    print(f"{case}: {errors[0]}")
    assert "Traceback" not in run.log and not STARTED.search(run.log)
    assert run.log.rstrip().endswith(errors[0])  # one paragraph, last
    for word in words:
        assert word in errors[0], errors[0]


@pytest.mark.parametrize("node_size", [(), ("--agoq-grad-node-size", "3")], ids=["one node", "nodes of 3"])
def test_two_hops_that_cannot_be(launcher, node_size):
    """Found once the ranks know each other; every rank says it, and none waits for another."""
    flags = ["--agoq-grad-bits", "8", "--agoq-grad-reduce", "two-hop", *node_size]
    run = launcher.run(*flags, "--train-iters", "2", ranks=2, timeout=60)
    assert run.codes == [2, 2], run.log[-3000:]
    found = re.findall(r"error: (--agoq-grad-reduce two-hop: .*)$", run.log, re.MULTILINE)
    assert len(found) == 1 and "Traceback" not in run.log, run.log[-3000:]
    assert all(word in found[0] for word in ("[0, 1]", "auto or flat", "--agoq-grad-node-size"))
    assert not STARTED.search(run.log) and run.report is None


def test_help_lists_all_flags(launcher):
    run = launcher.run("--help", timeout=60)
    assert run.codes == [0], run.log[-2000:]
    assert "--agoq-activations" in run.log and "--num-layers" in run.log
    assert "--agoq-grad-bits {32,16,8}" in run.log


def test_dry_run_prints_the_plan_and_stops(launcher, tmp_path):
    run = launcher.run(
        "--train-iters", "2", "--agoq-dry-run", "--save-interval", "1", "--hysteresis", "3",
        "--save", tmp_path / "checkpoint", "--moe-deepep-num-sms", "3",
    )  # fmt: skip
    assert run.codes == [0], run.log[-3000:]
    assert "in no test of this project (docs/support.md): --hysteresis\n" in run.log
    assert "nothing in this run reads it: --moe-deepep-num-sms\n" in run.log
    assert "core_attention.query" in run.log and "not quantized" in run.log
    assert not STARTED.search(run.log) and not (tmp_path / "checkpoint").exists()
    assert run.report is None
