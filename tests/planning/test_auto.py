"""Widths by the solver in real runs: bytes in flight against the prediction, gradients against exact ones.

Run as a script, this file trains a little, calibrates, and runs the pipelines on gloo ranks; the tests read
what they found. (One process imports Megatron and forks all ranks, and what makes Megatron run on a CPU
changes a process for good.)
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forked_ranks import RunFailed, fork_ranks, import_megatron
from launch import covering

# In FP32: nothing but the quantizer changes the gradients. No update, so that a second step has the same
# weights; the project's own meter takes the hooks of the first.
MODEL = """
    --num-layers 8 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --kv-channels 64
    --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm --disable-bias-linear
    --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --seq-length 64 --max-position-embeddings 64 --micro-batch-size 1 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64
    --lr-decay-style constant --eval-iters 0 --eval-interval 1000 --num-workers 0
    --clip-grad 0 --weight-decay 0
""".split()
STEPS = 2
TRAINED = 20
"""Iterations of the weights that all runs load."""
PP4 = "--pipeline-model-parallel-size 4"
VIRTUAL = "--num-layers-per-virtual-pipeline-stage"
INTERLEAVED = f"{PP4} {VIRTUAL} 1 --global-batch-size 8"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@dataclass(frozen=True)
class Real:
    """A run: its ranks and flags. ``{budget}`` stands for what uniform4 holds on stage 0, interleaved."""

    ranks: int
    flags: str


REAL = {
    "PP2": Real(2, "--pipeline-model-parallel-size 2 --global-batch-size 4"),
    "PP2, uneven": Real(
        2, "--pipeline-model-parallel-size 2 --global-batch-size 4 --decoder-first-pipeline-num-layers 3 "
        "--agoq-activations auto",  # within what agoq needs on the fullest stage
    ),
    "PP4": Real(4, "--pipeline-model-parallel-size 4 --global-batch-size 6 --micro-batch-size 2"),
    "PP2 x TP2": Real(
        4, "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel "
        "--global-batch-size 4 --agoq-activations auto --agoq-gpu-memory 1720MiB",
    ),
    "off": Real(4, f"{INTERLEAVED} --agoq-activations off"),
    "uniform4": Real(4, f"{INTERLEAVED} --agoq-activations uniform4"),
    "stage": Real(4, f"{INTERLEAVED} --agoq-activations stage"),
    "auto": Real(
        4, f"{INTERLEAVED} --agoq-activations auto --agoq-activation-memory {{budget}}B "
        "--agoq-sensitivities {folder}/sensitivities.json",
    ),
    "auto, shipped": Real(4, f"{INTERLEAVED} --agoq-activations auto --agoq-activation-memory {{budget}}B"),
}  # fmt: skip
RARE = {"PP2", "PP4", "stage"}
"""With --exhaustive only: uneven stages and interleaved ones hold the same chunks of layers."""
TWO_RANKS = "--pipeline-model-parallel-size 2 --global-batch-size 4 --agoq-activations auto"


# --- On the ranks ---------------------------------------------------------------------------------


class Kept:
    """What autograd saved, counted as long as autograd has it."""

    def __init__(self, tensor: torch.Tensor, flight: InFlight):
        self.tensor, self._flight = tensor, flight
        self._flight.add(tensor)

    def __del__(self):
        self._flight.remove(self.tensor)


class InFlight:
    """Bytes of the storages that autograd keeps within the decoder's layers, each counted once."""

    def __init__(self):
        self.now = self.peak = 0
        self._held: Counter = Counter()
        self.constants: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.constants:
            return
        self._held[storage.data_ptr()] += 1
        if self._held[storage.data_ptr()] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def remove(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.constants:
            return
        self._held[storage.data_ptr()] -= 1
        if not self._held[storage.data_ptr()]:
            self.now -= storage.nbytes()

    @contextmanager
    def watching(self, decoders: list[torch.nn.Module]) -> Iterator[None]:
        """Count what the layers save, not what the final norm does."""
        hooks, handles = [], []

        def enter(*_) -> None:
            hooks.append(
                torch.autograd.graph.saved_tensors_hooks(
                    lambda tensor: Kept(tensor.detach(), self), lambda kept: kept.tensor
                )
            )
            hooks[-1].__enter__()

        def leave(*_) -> None:
            if hooks:
                hooks.pop().__exit__(None, None, None)

        for decoder in decoders:
            self.constants |= {
                t.untyped_storage().data_ptr() for t in (*decoder.parameters(), *decoder.buffers())
            }
            handles.append(decoder.layers[0].register_forward_pre_hook(enter))
            handles.append(decoder.layers[-1].register_forward_hook(leave))
        yield
        for handle in handles:
            handle.remove()


def watch(out: Path) -> None:
    """Before a training run: leave the last step's gradients and the peak of what was kept."""
    from agoq_megatron.seams import compat

    steps, rank = [0], os.environ["RANK"]

    def wrap(stock):
        @functools.wraps(stock)
        def train_step(step, data, model, *args, **kwargs):
            steps[0] += 1
            if steps[0] < STEPS:
                return stock(step, data, model, *args, **kwargs)
            decoders, flight = [], InFlight()
            for chunk in model:
                while not hasattr(chunk, "decoder"):
                    chunk = chunk.module
                decoders.append(chunk.decoder)
            with flight.watching(decoders):
                result = stock(step, data, model, *args, **kwargs)
            gradients = [p.main_grad.clone() for chunk in model for p in chunk.parameters()]
            torch.save((gradients, flight.peak, flight.now), out / f"rank{rank}.pt")
            return result

        return train_step

    compat.bind_training_loop("train_step", wrap)


def train(flags: list[str], prepare=lambda: None) -> None:
    from agoq_megatron.entries import training
    from agoq_megatron.seams import cpu

    cpu.install()
    sys.argv = ["pretrain_gpt_agoq.py", *MODEL, *flags]
    prepare()
    training.main(on_cpu=True)


def train_with_other_budgets(flags: list[str]) -> None:
    """As if one node had another file."""
    train([*flags, "--agoq-activation-memory", "700KiB" if os.environ["RANK"] == "0" else "650KiB"])


def calibrate(folder: Path) -> None:
    from agoq_megatron import calibrate

    flags = f"--train-iters 1 --lr 1e-3 --global-batch-size 1 --calibrate-batches 2 {FULL}".split()
    output = ["--calibrate-output", str(folder / "sensitivities.json")]
    sys.argv = ["calibrate.py", *MODEL, *flags, *output, "--load", str(folder / "weights")]
    calibrate.main()


def predict(ranks: int, flags: list[str], out: Path) -> None:
    """By the planner alone: saved bytes of each stage at its peak."""
    from agoq_megatron import plan
    from agoq_megatron.seams import cpu

    cpu.install(quiet=True)
    _, args = plan.parse(["--gpus", str(ranks), *MODEL, *flags])
    rows = plan.Planner(args).footprints()
    out.write_text(json.dumps([row.parts["saved activations"] for row in rows]))


def collect(folder: Path, names: list[str]) -> None:
    """The runs of this file that are named."""
    import_megatron()
    import agoq_megatron.calibrate
    import agoq_megatron.plan  # noqa: F401

    def run(ranks: int, name: str, task, *arguments, fails: bool = False) -> str:
        """What the first rank printed."""
        start, failed = time.monotonic(), False
        try:
            fork_ranks(ranks, functools.partial(task, *arguments), folder / name)
        except RunFailed:
            failed = True
        log = (folder / name / "rank0.log").read_text()
        if failed != fails:
            logs = "\n".join(f.read_text()[-3000:] for f in sorted((folder / name).glob("*.log")))
            raise RuntimeError(f"{name} {'failed' if failed else 'did not fail'}:\n{logs}")
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
        return log

    weights = str(folder / "weights")
    steps = f"--train-iters {TRAINED} --lr 3e-3 --global-batch-size 4 --agoq-activations off".split()
    run(1, "train", train, [*steps, "--save", weights, "--save-interval", str(TRAINED)])
    run(1, "calibrate", calibrate, folder)
    base = f"--train-iters {STEPS} --lr 0 --min-lr 0".split()
    start = ["--load", weights, "--finetune", "--no-load-optim", "--no-load-rng"]
    found, budget = {}, 0
    for name, real in ((name, REAL[name]) for name in names):
        flags = [*base, *real.flags.format(budget=budget, folder=folder).split()]
        place = folder / f"predict {name}.json"
        run(1, f"predict {name}", predict, real.ranks, flags, place)
        predicted = json.loads(place.read_text())
        if name == "uniform4":
            budget = int(predicted[0])
        prepare = functools.partial(watch, folder / name)
        report = folder / name / "report.json"
        log = run(real.ranks, name, train, [*flags, *start, "--agoq-report", str(report)], prepare)
        dumps = [torch.load(folder / name / f"rank{rank}.pt") for rank in range(real.ranks)]
        found[name] = {
            "predicted": predicted, "log": log, "report": json.loads(report.read_text()),
            "measured": [peak for _, peak, _ in dumps], "left": [left for _, _, left in dumps],
        }  # fmt: skip
    flags = [*base, *TWO_RANKS.split()]
    found["other widths"] = run(2, "other widths", train_with_other_budgets, flags, fails=True)
    (folder / "found.json").write_text(json.dumps(found))


# --- The tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(launcher, tmp_path_factory, request) -> Path:
    """What all the runs have written."""
    folder = tmp_path_factory.mktemp("auto")
    everything = request.config.getoption("--exhaustive")
    names = [name for name in REAL if everything or name not in RARE]
    launcher.script(__file__, folder, *names, timeout=590)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict:
    return json.loads((folder / "found.json").read_text())


def whole_runs(test):
    """Marks of a test that needs the runs, which the first of them waits for."""
    return pytest.mark.slow(pytest.mark.timeout(600)(test))


@whole_runs
@pytest.mark.parametrize("name", covering(REAL, set(REAL) - RARE))
def test_bytes_in_flight(found, name):
    """On each rank, all that autograd keeps within the layers, against the planner: within 1%."""
    run = found[name]
    tensor_parallel = REAL[name].ranks // len(run["predicted"])
    predicted = [size for size in run["predicted"] for _ in range(tensor_parallel)]
    for rank, (measured, size) in enumerate(zip(run["measured"], predicted, strict=True)):
        print(f"{name}, rank {rank}: predicted {size:.0f}, measured {measured} ({measured / size - 1:+.2%})")
        assert measured == pytest.approx(size, rel=0.01)
    assert not any(run["left"])  # nothing is kept after the step


def gradient_errors(folder: Path, name: str) -> tuple[float, list[float]]:
    """Relative L2 error against ``off``: of all gradients of all ranks, and of each rank's."""
    differences, exact = [], []
    for rank in range(REAL[name].ranks):
        mine, reference = (torch.load(folder / run / f"rank{rank}.pt")[0] for run in (name, "off"))
        pairs = list(zip(mine, reference, strict=True))
        differences.append(sum((a.double() - b.double()).square().sum().item() for a, b in pairs))
        exact.append(sum(b.double().square().sum().item() for _, b in pairs))
    each = [(a / b) ** 0.5 for a, b in zip(differences, exact, strict=True)]
    return (sum(differences) / sum(exact)) ** 0.5, each


@whole_runs
def test_gradients_of_auto_lie_nearer_to_the_exact_ones(folder, found):
    """At uniform4's peak, on four stages of two chunks: from the same weights, on the same batch."""
    errors = {}
    for name in [name for name in ("uniform4", "stage", "auto", "auto, shipped") if name in found]:
        errors[name], each = gradient_errors(folder, name)
        print(f"{name}: {errors[name]:.4f}, by rank {' '.join(f'{e:.4f}' for e in each)}; bytes in flight "
              f"{found[name]['measured']}")  # fmt: skip
    budget = found["uniform4"]["measured"][0] * 1.001
    assert max(found["auto"]["measured"]) <= budget and max(found["auto, shipped"]["measured"]) <= budget
    assert 0 < errors["auto"] < 0.8 * errors["uniform4"]
    assert 0 < errors["auto, shipped"] < errors["uniform4"]


@whole_runs
def test_what_is_printed_and_reported(found):
    run = found["auto"]
    solver, text = run["report"]["solver"], run["log"]
    assert "AGoQ: widths within --agoq-activation-memory" in text
    budget = int(found["uniform4"]["predicted"][0])
    assert [row["in_flight"] for row in solver["stages"]] == [11, 9, 7, 5]
    assert all(row["peak_bytes"] <= row["budget_bytes"] == budget for row in solver["stages"])
    assert [row["peak_bytes"] for row in solver["stages"]] == pytest.approx(run["predicted"])
    assert solver["bound"] <= solver["cost"] < solver["cost_of_uniform4"]
    # The plan, the report and the layers say the same.
    kept = run["report"]["kept"]
    for tensor, widths in solver["widths"].items():
        line = next(line for line in text.splitlines() if line.strip().startswith(tensor) and "bits:" in line)
        for width, layers in widths.items():
            assert f"{width} bits: layers {layers}" in line
            assert any(layers == numbers for numbers in kept[tensor].values()), (tensor, kept[tensor])
    assert found["off"]["report"]["solver"] is None
    assert "AGoQ: widths within what agoq needs on the fullest stage (" in found["PP2, uneven"]["log"]


@whole_runs
def test_sums_of_sensitivities(folder, found):
    """Of the solver's widths and of 4 bits everywhere: what the file says of each layer, added up here. The
    model is as deep as the measured one, so that each layer has its own numbers."""
    layers = json.loads((folder / "sensitivities.json").read_text())["layers"]
    solver = found["auto"]["report"]["solver"]

    def cost(tensor: str, width: str, number: int) -> float:
        entry = layers[str(number)][tensor].get(width) or {"own": 0.0, "flowing": 0.0}  # 16 bits
        return entry["own"] ** 2 + entry["flowing"] ** 2

    def members(ranges: str) -> list[int]:
        ends = [list(map(int, part.split("-"))) for part in ranges.split(", ")]
        return [number for pair in ends for number in range(pair[0], pair[-1] + 1)]

    chosen = [
        cost(tensor, width, number)
        for tensor, widths in solver["widths"].items()
        for width, numbers in widths.items()
        for number in members(numbers)
    ]
    four = [cost(tensor, "4", number) for tensor in solver["widths"] for number in range(1, 9)]
    assert len(chosen) == len(four) == 8 * 6 and len(set(four)) > 24
    assert sum(chosen) == pytest.approx(solver["cost"], rel=1e-6)
    assert sum(four) == pytest.approx(solver["cost_of_uniform4"], rel=1e-6)


@whole_runs
def test_ranks_that_disagree_are_refused(found):
    text = found["other widths"]
    assert "--agoq-activations auto: ranks 1 chose other widths than rank 0" in text
    assert "Traceback" not in text and "training ..." not in text.splitlines()


if __name__ == "__main__":
    collect(Path(sys.argv[1]), sys.argv[2:])
