"""What a run leaves behind: report, TensorBoard, W&B; and what a refused or dry run does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from agoq_kernels.gradients import BLOCK, segment_bytes
from launch import covering
from wandb_file import read_run

pytestmark = pytest.mark.slow

VALIDATION = ["--eval-iters", "2", "--eval-interval", "3"]


def series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars: {tag: [(step, value)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]}


@pytest.mark.supports("TensorBoard", "W&B", "BF16")
@pytest.mark.parametrize("started", covering(["forked", "torchrun"], {"forked"}))
def test_with_every_writer(launcher, tmp_path, started):
    """On two ranks; then resumed: one W&B run, series continued. By torchrun, as a user types it, runs also
    start in tests/scripts."""
    flags = [
        *("--train-iters", 6, "--save", tmp_path / "ckpt", "--load", tmp_path / "ckpt"),
        *("--save-interval", 100, "--use-distributed-optimizer", "--log-throughput"),
        *("--tensorboard-dir", tmp_path / "tb", "--wandb-project", "test", "--wandb-exp-name", "x"),
        *("--num-workers", 1, *VALIDATION),
    ]
    first = launcher.run(*flags, "--exit-interval", 4, ranks=2, torchrun=started == "torchrun")
    assert first.ok, first.log[-4000:]
    assert "no GPU found; training on the CPU" in first.log
    assert first.log.count("AGoQ: saved activations, policy agoq") == 1
    assert "TFLOP/s" in first.log
    run_id = (tmp_path / "ckpt" / "wandb_run_id").read_text().strip()

    second = launcher.run(*flags, ranks=2)
    assert second.ok, second.log[-4000:]
    assert (tmp_path / "ckpt" / "wandb_run_id").read_text().strip() == run_id
    exact = first.losses() | second.losses()
    runs = sorted((tmp_path / "ckpt" / "wandb").rglob("offline-run-*"))
    assert len(runs) == 2 and all(r.name.endswith(run_id) for r in runs)
    logged = read_run(tmp_path / "ckpt" / "wandb")
    assert logged.run_id == run_id
    # One row an iteration, and the steps are the iterations: nothing was repeated.
    assert [row["iteration"] for row in logged.rows] == [row["_step"] for row in logged.rows]
    assert [row["lm loss"] for row in logged.rows] == pytest.approx(list(exact.values()))

    tags = series(tmp_path / "tb")
    assert [step for step, _ in tags["lm loss"]] == list(range(1, 7))
    assert [value for _, value in tags["lm loss"]] == pytest.approx(list(exact.values()), rel=1e-6)
    assert [step for step, _ in tags["grad-norm"]] == list(range(1, 7))
    # In the loop at 3 and 6; after it once more, and on the test set, both under the same tag.
    assert [step for step, _ in tags["lm loss validation"]] == [3, 6, 6, 6]

    report = second.report
    assert report["iterations"] == 6 and report["tokens"] == 6 * 4 * 64
    assert report["final_train_loss"] == exact[6]
    assert report["final_valid_loss"] == pytest.approx(tags["lm loss validation"][2][1], rel=1e-6)
    assert report["device"] == "cpu" and report["peak_memory_bytes"] is None
    assert report["step_ms"] > 0
    # FP32 gradients, reduced and scattered over two ranks: half of each rank's leaves it.
    assert (
        report["gradient_bytes_sent"]
        == report["gradient_bytes"] / 2
        == tags["agoq/gradient-bytes-sent"][0][1]
    )
    measured = sum(t["measured_bytes_per_token"] for t in report["tensors"])
    assert report["saved_bytes_per_token_layer"] == pytest.approx(measured)
    assert measured == pytest.approx(report["planned_bytes_per_token_layer"], rel=0.01)


@pytest.mark.parametrize("distributed", [True, False])
def test_8_bit_gradients_are_measured(launcher, tmp_path, distributed):
    """Bytes held and sent, and the errors of a sample, in the report and in TensorBoard."""
    flags = ["--train-iters", 4, "--agoq-grad-bits", 8, "--agoq-grad-probe-interval", 2]
    flags += ["--tensorboard-dir", tmp_path / "tb", "--overlap-grad-reduce", "--ddp-bucket-size", 20000]
    run = launcher.run(*flags, *["--use-distributed-optimizer"] * distributed, ranks=2)
    assert run.ok, run.log[-4000:]
    assert "gradients: int8 in blocks of 64" in run.log
    report, tags = run.report, series(tmp_path / "tb")
    assert report["gradient_bits"] == 8
    assert 1.59 < report["gradient_bytes_per_parameter"] < 1.61  # codes, scales and residual
    # Half of the codes leave a rank of two; without the distributed optimizer half of the sums too.
    sent = report["gradient_bytes_sent"] / report["gradient_bytes"]
    codes = segment_bytes(1) / (segment_bytes(1) + BLOCK / 2)  # the residual stays
    assert sent == pytest.approx(codes * (0.5 if distributed else 1.0), rel=0.01)
    assert [e["iteration"] for e in report["gradient_errors"]] == [1, 3]
    for name in ("accumulated", "reduced"):
        values = [e[name] for e in report["gradient_errors"]]
        # What was reduced is the sum of codes, exactly; to share it, it is quantized once more.
        low, high = (0.003, 0.02) if name == "accumulated" or not distributed else (0.0, 1e-6)
        assert all(low <= value < high for value in values), (name, values)
        assert tags[f"agoq/gradient-error-{name}"] == [
            (1, pytest.approx(values[0])),
            (3, pytest.approx(values[1])),
        ]
    assert tags["agoq/gradient-bytes"][0] == (1, report["gradient_bytes"])
    assert tags["agoq/gradient-bytes-sent"][-1] == (3, report["gradient_bytes_sent"])


STATES = {  # flags: bytes of a parameter of the weight matrices; of embedding and norms
    "": (12, 12),
    "--agoq-master-weights split": (10, 10),
    "--agoq-optimizer-bits 8": (4.0625, 10),
    "--agoq-optimizer-bits 8 --agoq-master-weights fp32": (6.0625, 12),
}


@pytest.mark.parametrize("flags", covering(STATES, {"", "--agoq-optimizer-bits 8"}))
def test_optimizer_states_are_measured(launcher, tmp_path, flags):
    """To the byte."""
    matrices, others = STATES[flags]
    more = ["--train-iters", 2, "--tensorboard-dir", tmp_path / "tb", "--use-distributed-optimizer"]
    run = launcher.run(*more, *flags.split())
    assert run.ok, run.log[-4000:]
    layer = 512 * 128 + 128 * 256 + 512 * 128 + 128 * 256
    expected = matrices * (2 * layer + 128 * 128) + others * (128 * 128 + 5 * 128)
    assert run.report["optimizer_bytes"] == expected
    found = series(tmp_path / "tb")
    assert found["agoq/optimizer-bytes"] == [(1, expected)]
    parameters = 2 * layer + 2 * 128 * 128 + 5 * 128
    assert found["agoq/optimizer-bytes-per-parameter"][0][1] == pytest.approx(expected / parameters)


def test_a_new_run_in_an_old_folder_is_a_new_wandb_run(launcher, tmp_path):
    """Without --load nothing is resumed, W&B's run neither."""
    (tmp_path / "wandb_run_id").write_text("old\n")
    flags = ["--train-iters", 1, "--save", tmp_path, "--save-interval", 10]
    flags += ["--tensorboard-dir", tmp_path / "tb", "--wandb-project", "p", "--wandb-exp-name", "x"]
    run = launcher.run(*flags)
    assert run.ok, run.log[-4000:]
    assert (tmp_path / "wandb_run_id").read_text().strip() != "old"


def test_dry_run_leaves_no_trace(launcher, tmp_path):
    flags = ["--train-iters", 1, "--tensorboard-dir", tmp_path / "tb", "--agoq-dry-run"]
    run = launcher.run(*flags, "--save", tmp_path / "ckpt", "--save-interval", 1, ranks=2)
    assert run.ok, run.log[-4000:]
    assert run.log.count("AGoQ: saved activations") == 1
    assert run.report is None
    assert "initializing torch distributed" not in run.log
    assert not list(tmp_path.iterdir())


BAD = {
    "an unknown flag": (["--no-such-flag"], "--no-such-flag"),
    "W&B without TensorBoard": (["--wandb-project", "p"], "--tensorboard-dir"),
    "W&B without a name": (
        ["--wandb-project", "p", "--tensorboard-dir", "tb"],
        "--wandb-exp-name",
    ),
    "a type": (["--num-layers", "two"], "--num-layers"),
    "Megatron's own refusal": (
        ["--eval-global-batch-size", "3", "--eval-micro-batch-size", "2"],
        "divisible",
    ),
    "a missing tokenizer": (
        ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/nowhere/at/all"],
        "/nowhere/at/all",
    ),
    "more ranks asked for than there are": (["--tensor-model-parallel-size", "2"], "the 1 ranks"),
    "no checkpoint to take flags from": (["--use-checkpoint-args"], "--load"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage_is_one_paragraph(launcher, case):
    flags, named = BAD[case]
    run = launcher.run("--train-iters", 1, *flags, timeout=60)
    assert run.codes == [2], run.log[-4000:]
    message = run.log.partition("pretrain_gpt_agoq.py: error: ")[2].strip()
    assert message and "\n\n" not in message and "Traceback" not in run.log
    assert named in message
    assert len(message) < 700
