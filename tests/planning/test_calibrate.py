"""Sensitivities: measured layer by layer against the whole model, and one rank against several.

Run as a script, this file measures; the tests read what it found. (One process imports Megatron and forks all
ranks, and what makes Megatron run on a CPU changes a process for good.)
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forked_ranks import RunFailed, fork_ranks, import_megatron
from launch import covering

# In FP32, so that nothing but the quantizer differs. All formats' groups divide all tensors on two ranks. It
# has biases: much of the gradient is then of parameters that all tensor-parallel ranks have.
MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --kv-channels 64
    --group-query-attention --num-query-groups 2 --swiglu --normalization LayerNorm
    --position-embedding-type rope --untie-embeddings-and-output-weights --attention-dropout 0
    --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1 --global-batch-size 4 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64 --train-iters 3
    --lr 3e-3 --lr-decay-style constant --eval-iters 0 --eval-interval 1000 --num-workers 0
""".split()
LLAMA = "--normalization RMSNorm --disable-bias-linear"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LAYERS, WIDTHS = 4, (2, 3, 4, 5, 6, 8, 10, 12)
CHECKED_LAYERS, CHECKED_WIDTHS = (1, 3), (2, 4, 8)
"""Within the whole model."""
ONE_CODE = 0.01
"""Where sums run in another order a code may come out as its neighbour. One code is some 0.4% of an error."""


@dataclass(frozen=True)
class Layout:
    """Of a run.

    Attributes:
        ranks, flags: how it is started.
        batches: micro-batches of a data-parallel rank.
        reference: the run that must find the same errors.
        trained: it loads the weights that were saved; else they are random.
    """

    ranks: int
    flags: str = ""
    batches: int = 1
    reference: str = "one batch"
    trained: bool = True


LAYOUTS = {
    "two batches": Layout(1, FULL, batches=2),
    "one batch": Layout(1),
    "tensor": Layout(2, "--tensor-model-parallel-size 2"),
    "sequence": Layout(2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "stages": Layout(2, "--pipeline-model-parallel-size 2", batches=2, reference="two batches"),
    # Such a schedule takes two micro-batches at least. The first is measured.
    "interleaved": Layout(2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "data": Layout(2, reference="two batches"),
    "random": Layout(1, LLAMA, trained=False),
    # Not with biases: there such a run does not end, calibration or training.
    "MLP again": Layout(
        1, f"{LLAMA} --recompute-granularity selective --recompute-modules mlp", 1, "random", trained=False
    ),
}
RARE = {"interleaved"}
"""With --exhaustive only."""
REFUSED = {
    "no output": ([], "--calibrate-output: name the JSON file"),
    "no folder": (["--calibrate-output", "nowhere/a.json"], "nowhere/a.json: its folder does not exist"),
    "a folder": (["--calibrate-output", "."], "that is a folder"),
    "no batches": (["--calibrate-output", "a.json", "--calibrate-batches", "0"], "give a positive number"),
    "dry run": (["--calibrate-output", "a.json", "--agoq-dry-run"], "nothing would be measured"),
    "Megatron's": (
        ["--calibrate-output", "a.json", "--num-experts", "2"],
        "--num-experts: mixtures of experts are not calibrated",
    ),
}


# --- On the ranks ---------------------------------------------------------------------------------


def pretrain(folder: Path) -> None:
    """Train a little, and save the weights of all runs."""
    from agoq_megatron.entries import training
    from agoq_megatron.seams import cpu

    cpu.install()
    sys.argv = ["pretrain_gpt_agoq.py", *MODEL, "--save", str(folder), "--save-interval", "3"]
    training.main(on_cpu=True)


def calibrate(flags: list[str]) -> None:
    from agoq_megatron import calibrate

    sys.argv = ["calibrate.py", *MODEL, *flags]
    calibrate.main()


def whole_model(folder: Path) -> None:
    """The second way: quantize one tensor of one layer within the whole model, and take all gradients."""
    from megatron.training.initialize import initialize_megatron

    from agoq_megatron.autograd.recompute import quantized_checkpoint
    from agoq_megatron.calibrate import batches, build_model
    from agoq_megatron.entries import training
    from agoq_megatron.modules.sites import LAYER_INPUT
    from agoq_megatron.planning.sensitivity import SOLVED, best_format
    from agoq_megatron.policy.policy import Rule
    from agoq_megatron.policy.sites import Site
    from agoq_megatron.seams import compat, cpu

    @dataclass(frozen=True)
    class Policy:
        layer_number: int = 0
        site: Site | None = None
        width: int = 0
        name = "one tensor of one layer"

        def rule(self, site: Site, layer_number: int) -> Rule:
            if site is self.site and layer_number == self.layer_number:
                return Rule(format=best_format(site, self.width))
            return Rule(keep=not site.recomputable)

    cpu.install()
    flags = f"{FULL} --hidden-dropout 0 --load".split()
    sys.argv = ["whole_model", *MODEL, *flags, str(folder / "weights")]
    args, _ = training.prepare(on_cpu=True)
    compat.skip_compiling_helpers()
    compat.bind_checkpoint(quantized_checkpoint)
    initialize_megatron(allow_no_cuda=True)
    (model,), _ = build_model(args)
    layers, data = model.decoder.layers, list(batches(args, 2, None))
    flowing: dict[int, list[torch.Tensor]] = {}

    def watch(layer, _, arguments):
        if torch.is_grad_enabled():
            mine = flowing.setdefault(layer.layer_number, [])
            arguments["hidden_states"].register_hook(lambda grad: mine.append(grad.clone()))

    for layer in layers:
        layer.register_forward_pre_hook(watch, with_kwargs=True)

    def gradients(policy: Policy) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer: all its parameters' gradients, and that of its input."""
        flowing.clear()
        model.zero_grad(set_to_none=True)
        for layer in layers:
            layer.set_policy(policy)
        for batch in data:
            model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).mean().backward()
        return {
            layer.layer_number: (
                torch.cat([p.grad.flatten() for p in layer.parameters()]),
                torch.cat([g.flatten() for g in flowing[layer.layer_number]]),
            )
            for layer in layers
        }

    exact, found = gradients(Policy()), {}
    for number in CHECKED_LAYERS:
        for site in (*SOLVED, LAYER_INPUT):
            for width in CHECKED_WIDTHS:
                pairs = zip(gradients(Policy(number, site, width))[number], exact[number], strict=True)
                off = [((a - b).norm() / b.norm()).item() for a, b in pairs]
                found[f"{number} {site.value} {width}"] = off
    (folder / "whole.json").write_text(json.dumps(found))


def collect(folder: Path, names: list[str]) -> None:
    """All runs of this file, of the layouts those named."""
    import_megatron()
    import agoq_megatron.calibrate  # noqa: F401

    def run(ranks: int, name: str, task, *arguments, fails: bool = False) -> str:
        """What the first rank printed."""
        start, failed = time.monotonic(), False
        try:
            fork_ranks(ranks, functools.partial(task, *arguments), folder / name)
        except RunFailed:
            failed = True
        log = (folder / name / "rank0.log").read_text()
        if failed != fails:
            raise RuntimeError(f"{name} {'failed' if failed else 'did not fail'}:\n{log[-3000:]}")
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
        return log

    run(1, "pretrain", pretrain, folder / "weights")
    run(1, "whole", whole_model, folder)
    found = {}
    for name, layout in ((name, LAYOUTS[name]) for name in names):
        load = ["--load", str(folder / "weights")] if layout.trained else []
        flags = measured(folder, name, layout.batches, *layout.flags.split(), *load)
        found[name] = run(layout.ranks, name, calibrate, flags)
    for name, (flags, _) in REFUSED.items():
        found[name] = run(1, name, calibrate, flags, fails=True)
    flags = measured(folder, "nothing", 1, "--init-method-std", "0")
    found["nothing"] = run(1, "nothing", calibrate, flags, fails=True)
    (folder / "said.json").write_text(json.dumps(found))


def measured(folder: Path, name: str, batches: int, *flags: str) -> list[str]:
    return ["--calibrate-output", str(folder / f"{name}.json"), "--calibrate-batches", str(batches), *flags]


# --- The tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(launcher, tmp_path_factory, request) -> Path:
    """What all the runs have written."""
    folder = tmp_path_factory.mktemp("calibrate")
    everything = request.config.getoption("--exhaustive")
    names = [name for name in LAYOUTS if everything or name not in RARE]
    launcher.script(__file__, folder, *names, timeout=290)
    return folder


@pytest.fixture(scope="module")
def said(folder) -> dict[str, str]:
    """What the first rank of each run printed."""
    return json.loads((folder / "said.json").read_text())


def whole_runs(test):
    """Marks of a test that needs the runs, which the first of them waits for."""
    return pytest.mark.slow(pytest.mark.timeout(300)(test))


def errors(folder: Path, name: str) -> dict[tuple, tuple[float, float]]:
    """Own and flowing error of each (layer, tensor, width)."""
    from agoq_megatron.planning.sensitivity import load_sensitivities

    layers = load_sensitivities(folder / f"{name}.json").data["layers"]
    return {
        (int(number), site, int(width)): (entry["own"], entry["flowing"])
        for number, sites in layers.items()
        for site, widths in sites.items()
        for width, entry in widths.items()
    }


@whole_runs
def test_a_layer_alone_has_the_errors_of_the_whole_model(folder):
    alone, whole = errors(folder, "two batches"), json.loads((folder / "whole.json").read_text())
    assert len(whole) == len(CHECKED_LAYERS) * 7 * len(CHECKED_WIDTHS)
    for key, expected in whole.items():
        number, site, width = key.split()
        assert alone[int(number), site, int(width)] == pytest.approx(expected, rel=ONE_CODE), key


@whole_runs
@pytest.mark.parametrize("name,sites", [("two batches", 7), ("random", 6)])
def test_errors_fall_with_the_width(folder, name, sites):
    found = errors(folder, name)
    rows = {(number, site) for number, site, _ in found}
    assert len(rows) == LAYERS * sites and len(found) == len(rows) * len(WIDTHS)
    for row in rows:
        for which in range(2):
            falling = [found[*row, width][which] for width in WIDTHS]
            for wide, narrow in itertools.pairwise(falling):
                # 3 bits in groups of 32 can be as good as NF4 in groups of 64: docs/log.md.
                close = 1.1 if wide == falling[1] else 1
                assert narrow < close * wide, (row, falling)
            assert 0 < falling[-1] < 0.02 and falling[-1] < 0.1 * falling[0], (row, falling)


@whole_runs
@pytest.mark.parametrize(
    "name", covering(["tensor", "sequence", "stages", "interleaved"], {"tensor", "sequence", "stages"})
)
def test_layouts_agree(folder, name):
    """A norm or bias that counts twice, or in part, would be off by 2% and more, at every width. A scale that
    comes out as its neighbour changes one width's error, by 5% at times."""
    bound = ONE_CODE if name in ("tensor", "sequence") else 1e-6
    found, expected = errors(folder, name), errors(folder, LAYOUTS[name].reference)
    assert len(found) == LAYERS * 6 * len(WIDTHS)
    off: dict[tuple, list[float]] = {}
    for key, pair in found.items():
        off.setdefault(key[:2], []).extend(abs(a / b - 1) for a, b in zip(pair, expected[key], strict=True))
    for row, differences in off.items():
        assert statistics.median(differences) < bound and max(differences) < 10 * bound, (row, differences)


@whole_runs
def test_data_parallel_ranks(folder):
    """Squared errors of a gradient that flows are summed over batches, wherever they are. A rank sums the
    layer's own gradients first; over ranks it is their squares. If two ranks' gradients agree and their
    errors do not, then the sum's relative error is smaller by the root of two."""
    found, expected = errors(folder, "data"), errors(folder, "two batches")
    for key, (own, flowing) in found.items():
        assert flowing == pytest.approx(expected[key][1], rel=1e-6), key
        assert 0.9 < own / expected[key][0] < 1.45, key


@whole_runs
def test_an_mlp_that_is_recomputed_starts_from_the_quantized_input(folder):
    """So that the error of norm 2's input reaches all of the MLP's gradients."""
    found, expected = errors(folder, "MLP again"), errors(folder, "random")
    for key, pair in found.items():
        if key[1] == "mlp.linear_fc1.norm_input":
            assert all(a > 1.05 * b for a, b in zip(pair, expected[key], strict=True)), key
        else:
            assert pair == pytest.approx(expected[key], rel=ONE_CODE), key


@whole_runs
def test_the_file(folder):
    data = json.loads((folder / "sequence.json").read_text())
    assert data["model"] == {
        "layers": LAYERS, "hidden_size": 128, "ffn_hidden_size": 256, "heads": 4, "query_groups": 2,
        "gated": True, "normalization": "LayerNorm", "seq_length": 32, "tensor_parallel": 2,
        "pipeline_parallel": 1, "data_parallel": 1, "sequence_parallel": True,
    }  # fmt: skip
    assert (data["checkpoint"], data["tokens"], data["dtype"], data["device"]) == (3, 32, "float32", "CPU")
    assert json.loads((folder / "data.json").read_text())["tokens"] == 64
    assert data["command"].startswith("python -m agoq_megatron.calibrate ")
    assert " --calibrate-output " in data["command"]
    assert data["formats"]["4"] == "nf4 g64 s8" and list(data["formats"]) == list(map(str, WIDTHS))
    entry = data["layers"]["2"]["mlp.linear_fc1.output"]["4"]
    assert entry.keys() == {"own", "flowing", "bits"} and entry["bits"] == 4.125
    assert json.loads((folder / "random.json").read_text())["checkpoint"] is None


@whole_runs
def test_what_is_printed(said):
    assert "WARNING: no checkpoint was loaded" in said["random"]
    text = said["two batches"]
    assert "WARNING: no checkpoint was loaded" not in text
    assert "calibrate: layer 1 of 4 on this rank" in text and "two batches.json" in text
    table = text[text.index("Mean over the layers") :].splitlines()
    assert table[1].split() == [word for width in WIDTHS for word in (str(width), "bits")]
    assert [line.split()[0] for line in table[2:9]][-1] == "input"
    assert len(table[8].split()) == 1 + 3 * len(WIDTHS)


@whole_runs
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_exists(said, name):
    assert "calibrate.py: error: " in said[name] and REFUSED[name][1] in said[name]
    assert "initializing" not in said[name] and "Traceback" not in said[name]


@whole_runs
def test_gradients_of_nothing_are_refused(folder, said):
    assert "calibrate.py: error: the exact gradients of layer 1 are zero or not finite" in said["nothing"]
    assert not (folder / "nothing.json").exists() and not list(folder.glob(".*"))


if __name__ == "__main__":
    collect(Path(sys.argv[1]), sys.argv[2:])
