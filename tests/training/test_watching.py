"""Probes of a run, and widths that are raised: telemetry, the same on all ranks, kept by checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import MIDDLE, assert_killed_and_resumed, train
from launch import covering

from agoq_megatron.modules.sites import KEY, QUERY, VALUE
from agoq_megatron.policy.policy import load_policy
from tests.training.test_gradient_check import OLD
from tests.training.test_parallel import LAYOUTS, MODEL, RECOMPUTE, TP2
from tests.training.test_report import series

pytestmark = pytest.mark.slow

ENTRY = Path(__file__).with_name("watched_entry.py")
PLANNER = Path(__file__).parents[2] / "agoq_megatron" / "plan.py"
NORM1 = "self_attention.linear_qkv.norm_input"
NORM2, FC1 = "mlp.linear_fc1.norm_input", "mlp.linear_fc1.output"
ATTENTION = "self_attention.core_attention"
OUTPUT = f"{ATTENTION}.output"
SINGLE = {NORM1: 4, NORM2: 4, FC1: 5}
"""Tensors that are the only one that their function rounds, and their bits by the default policy."""
SEVERAL = {site.value: load_policy("agoq").rule(site, 1).format.bits for site in (QUERY, KEY, VALUE)}
MEASURED = {*SINGLE, *SEVERAL, ATTENTION}
PROBES = ["--no-agoq-check-gradients", "--agoq-probe-interval"]
EVERY = [*PROBES, 1, "--agoq-probe-layers", 1]
RAISING = [*PROBES, 2, "--agoq-probe-layers", 1, "--agoq-max-error", 0.052]
"""Of two layers, rounded stochastically: what has 4 bits and what has 5 is off by more."""


def errors(run) -> dict[int, dict[tuple[str, int], float]]:
    """{iteration: {(tensor or function, layer): error}}."""
    return {
        probe["iteration"]: {
            (name, int(layer)): error
            for name, of_layer in probe["errors"].items()
            for layer, error in of_layer.items()
        }
        for probe in run.report["tensor_gradient_errors"]
    }


def raises(run) -> list[tuple]:
    return [(r["iteration"], r["tensor"], r["layer"], r["old"], r["new"]) for r in run.report["raises"]]


def assert_as_planned(run) -> None:
    measured = run.report["saved_bytes_per_token_layer"]
    assert measured == pytest.approx(run.report["planned_bytes_per_token_layer"], rel=0.01)


def test_probes_change_nothing_and_are_reported(launcher, tmp_path):
    """In turn over the layers, in report and TensorBoard; training is what it is without."""
    flags = ["--train-iters", 5]
    probed = launcher.run(*flags, *PROBES, 2, "--agoq-probe-layers", 1, "--tensorboard-dir", tmp_path)
    plain = launcher.run(*flags, "--no-agoq-check-gradients")
    assert probed.ok and plain.ok, probed.log[-4000:]
    assert probed.losses() == plain.losses() and probed.grad_norms() == plain.grad_norms()
    assert plain.report["tensor_gradient_errors"] == plain.report["raises"] == []
    assert probed.report["raises"] == [] and probed.report["raised_widths"] == {}

    found, tags = errors(probed), series(tmp_path)
    assert list(found) == [1, 3, 5]
    for iteration, layer in ((1, 1), (3, 2), (5, 1)):
        assert found[iteration].keys() == {(name, layer) for name in MEASURED}
        for (name, _), error in found[iteration].items():
            low, high = (0.02, 0.14) if name in SINGLE else (0.0005, 0.05)
            assert low < error < high, (name, error)
        worst = max(found[iteration][name, layer] for name in SEVERAL)
        assert 0.8 * worst < found[iteration][ATTENTION, layer] < 1.8 * worst
    for name in MEASURED:
        per_probe = [(i, pytest.approx(found[i][name, n])) for i, n in ((1, 1), (3, 2), (5, 1))]
        assert tags[f"agoq/gradient-error/{name}"] == per_probe
        assert tags[f"agoq/gradient-error/{name}/layer-1"] == [per_probe[0], per_probe[2]]
        assert tags[f"agoq/gradient-error/{name}/layer-2"] == [per_probe[1]]


def test_the_series_of_a_tensor_is_its_worst_layer(launcher, tmp_path):
    run = launcher.run("--train-iters", 1, "--tensorboard-dir", tmp_path, "--agoq-probe-interval", 1)
    assert run.ok, run.log[-4000:]
    found, tags = errors(run)[1], series(tmp_path)
    for name in MEASURED:
        worst = pytest.approx(max(found[name, 1], found[name, 2]))
        assert tags[f"agoq/gradient-error/{name}"] == [(1, worst)]


def test_a_low_limit_raises_to_16_bits(launcher, tmp_path):
    """The tensor that puts the most into a function, a width a probe, each said in a line with what it costs;
    attention's output is first made again, if it is kept. What is kept follows, and errors fall."""
    policy = tmp_path / "old.yaml"
    policy.write_text(OLD)
    flags = ["--train-iters", 9, *PROBES, 1, "--agoq-max-error", 1e-6, "--agoq-loss-chunks", 2]
    run = launcher.run(*flags, "--agoq-activations", policy)
    assert run.ok, run.log[-4000:]
    found = errors(run)
    for layer in (1, 2):
        steps: dict[str, list] = {}
        for iteration, tensor, number, old, new in raises(run):
            if number == layer:
                steps.setdefault(tensor, []).append((iteration, old, new))
        ladder = [(1, 4, 5), (2, 5, 6), (3, 6, 8), (4, 8, 12), (5, 12, 16)]
        assert all(steps.pop(name) == ladder for name in SINGLE)
        assert steps.pop(OUTPUT) == [(1, 8, 0)]
        # Then one at a time of the other three, each time the one that was the worst.
        attention = sorted((i, old, new, name) for name, its in steps.items() for i, old, new in its)
        assert [i for i, *_ in attention] == list(range(2, 8)) and steps.keys() == SEVERAL.keys()
        assert all([(old, new) for _, old, new in its] == [(8, 12), (12, 16)] for its in steps.values())
        for i, _, _, name in attention[:-1]:
            rest = {n for n in SEVERAL if (n, layer) in found[i]}
            assert found[i][name, layer] == max(found[i][n, layer] for n in rest)
    for name in SINGLE:
        fall = [found[i][name, 1] for i in range(1, 6)]
        assert all(b < 0.8 * a for a, b in zip(fall[:4], fall[1:4], strict=False)), fall
    assert found[8] == {}  # nothing is quantized any more
    assert sorted(set(run.report["raised_widths"].values())) == [0, 16]
    off = launcher.run("--train-iters", 1, "--agoq-activations", "off")
    assert_as_planned(run)
    # Norm and activation outputs are recomputed all the same.
    kept = {row["name"]: row["measured_bytes_per_token"] for row in run.report["tensors"]}
    whole = {row["name"]: row["measured_bytes_per_token"] for row in off.report["tensors"]}
    assert {name: kept[name] for name in {*SINGLE, *SEVERAL}} == {
        name: whole[name] for name in {*SINGLE, *SEVERAL}
    }
    assert kept.get(OUTPUT, 0) == 0 < whole[OUTPUT]

    line = (
        r"^AGoQ: iteration (\d+): error (\S+) of the gradients that (\S+) in layer (\d+) is for exceeds (.*)"
    )
    lines = re.findall(line, run.log, re.M)
    assert [(int(i), name, int(layer)) for i, _, name, layer, _ in lines] == [r[:3] for r in raises(run)]
    for (_, error, *_, rest), it in zip(lines, run.report["raises"], strict=True):
        assert float(error) == pytest.approx(it["error"], abs=1e-4)
        new = {16: "16 bits, not quantized,", 0: "recomputed in backward"}.get(it["new"], f"{it['new']} bits")
        assert rest.startswith(
            f"--agoq-max-error 1e-06: from {it['old']} to {new} from the next iteration on"
        )
        assert f"costs {it['bytes']:g} bytes a token" in rest
    # 512 features of FC1's output: a bit more of each is 64 bytes. 256 of attention's, in 8 bits and a scale.
    assert [r["bytes"] for r in run.report["raises"] if (r["tensor"], r["layer"]) == (FC1, 1)][:2] == [64, 64]
    assert [r["bytes"] for r in run.report["raises"] if r["tensor"] == OUTPUT] == [-264, -264]


LIMIT = 0.06
"""Gate and up and the second norm's input put .065 to .1 into gradients, the first norm's in layer 1 .088, in
the others at most .053, attention's tensors less."""


@pytest.fixture(scope="module")
def common(launcher, tmp_path_factory):
    """Runs of four layers from one checkpoint, in FP32, of which the first iteration is probed."""
    start = tmp_path_factory.mktemp("start")
    made = launcher.run(*MODEL, "--train-iters", 1, "--save", start, "--save-interval", 1, tiny=False)
    assert made.ok, made.log[-4000:]

    def run(*flags, ranks=1, **more):
        done = launcher.run(
            *MODEL, "--train-iters", 2, "--load", start, "--finetune", *PROBES, 2, "--agoq-max-error", LIMIT,
            *flags, ranks=ranks, tiny=False,
            timeout=200, **more,
        )  # fmt: skip
        assert done.ok, done.log[-4000:]
        return done

    return run


@pytest.fixture(scope="module")
def one_rank(common):
    return common()


@pytest.mark.parametrize("layout", covering(LAYOUTS, {"TP2 SP", "TP2 SP x PP2 interleaved x DP2, all"}))
def test_every_layout_sees_the_same(common, one_rank, layout, tmp_path):
    """Errors of one rank, whatever the split (data-parallel ranks measure a micro-batch each); and every rank
    keeps its layers in the raised widths."""
    assert {it[1:] for it in raises(one_rank)} == {
        (name, n, bits, bits + 1) for name, bits in SINGLE.items() for n in (1, 2, 3, 4)
        if name != NORM1 or n == 1
    }  # fmt: skip
    ranks, flags = LAYOUTS[layout]
    run = common(*flags.split(), "--agoq-report", tmp_path / "r", ranks=ranks, entry=ENTRY)

    run.report = json.loads((tmp_path / "r").read_text())
    data_parallel = "DP2" in layout
    if not data_parallel:
        assert raises(run) == raises(one_rank)
    for iteration, expected in errors(one_rank).items():
        got = errors(run)[iteration]
        assert got.keys() == expected.keys()
        worst = max(abs(got[key] / expected[key] - 1) for key in expected if expected[key] > 1e-3)
        assert worst < (0.35 if data_parallel else 0.02), (iteration, worst)
    assert_as_planned(run)
    kept: dict[int, dict[str, int]] = {}
    for rank, path, bits in re.findall(r"^rank (\d+) keeps (\S+) in (\d+)$", run.log, re.M):
        kept.setdefault(int(rank), {})[path] = int(bits)
    assert kept.keys() == set(range(ranks))
    seen = {path for of_rank in kept.values() for path in of_rank}
    widths = run.report["raised_widths"]
    assert widths and widths.keys() <= seen
    of_policy = SINGLE | SEVERAL | {"input": 4}
    for of_rank in kept.values():
        for path, bits in of_rank.items():
            assert bits == widths.get(path, of_policy[path.split(".", 3)[3]]), (path, bits)


@pytest.mark.parametrize(
    "layout", covering(["one rank", "PP2 interleaved", "TP2 SP"], {"one rank", "TP2 SP"})
)
@pytest.mark.parametrize("kind", RECOMPUTE)
def test_under_recomputation(common, one_rank, kind, layout):
    """Full: the layer's input is what waits, and what costs. Selective: a tensor that is packed twice, at the
    entry of its region and in backward, has the error of the first."""
    ranks, flags = LAYOUTS.get(layout, (1, ""))
    run = common(*flags.split(), *RECOMPUTE[kind].split(), ranks=ranks)
    assert_as_planned(run)
    found, costs = errors(run)[1], {(r["tensor"], r["layer"]): r["bytes"] for r in run.report["raises"]}
    plain = errors(one_rank)[1]
    if kind == "full":
        assert {n for name, n in costs if name == "input"} == {1}
        assert all((cost > 0) == (name == "input") for (name, _), cost in costs.items())
        assert found["input", 1] == pytest.approx(plain[NORM1, 1], rel=0.1)
        assert found["self_attention.linear_qkv", 1] == pytest.approx(plain[NORM1, 1], rel=0.1)
    else:
        assert raises(run) == raises(one_rank)
        for key in [(name, layer) for name in SINGLE for layer in (1, 2, 3, 4)]:
            # The pass in which gradients flow makes gate and up from the norm's rounded input.
            assert found[key] == pytest.approx(plain[key], rel=0.1 if key[0] == FC1 else 0.02)
        assert (FC1, 1) in costs and costs[FC1, 1] == 0 < costs[NORM2, 1]


CASES = {
    "1 rank": (1, ()),
    "DP 2, distributed optimizer, 8-bit gradients": (
        2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--agoq-grad-bits", "8"),
    ),
    "PP 2": (2, ("--pipeline-model-parallel-size", "2")),
    "TP 2": (2, ("--tensor-model-parallel-size", "2", "--sequence-parallel")),
}  # fmt: skip


@pytest.mark.parametrize("case", covering(CASES, {"DP 2, distributed optimizer, 8-bit gradients"}))
def test_killed_and_resumed(launcher, whole, tmp_path, seed, case):
    """Widths that were raised before the checkpoint are there again; probes and raises after it are those of
    the uninterrupted run."""
    ranks, flags = CASES[case]
    flags = (*RAISING, *flags)
    expected, resumed = assert_killed_and_resumed(launcher, whole, tmp_path, seed, ranks, flags)
    assert {(1, FC1, 1, 5, 6), (1, NORM1, 1, 4, 5), (3, FC1, 2, 5, 6)} <= set(raises(expected))
    assert any(i > MIDDLE for i, *_ in raises(expected))
    first = min(resumed.losses())
    assert raises(resumed) == [it for it in raises(expected) if it[0] >= first]
    assert errors(resumed) == {i: found for i, found in errors(expected).items() if i >= first}
    assert resumed.report["raised_widths"] == expected.report["raised_widths"]
    plan = resumed.log[resumed.log.index("AGoQ: saved activations") :]
    assert "raised by --agoq-max-error: mlp.linear_fc1.output to " in plan
    assert_as_planned(resumed)


def raised_by_then(run) -> dict[str, int]:
    """Widths in the checkpoint in the middle of a run."""
    raised = sorted(it for it in raises(run) if it[0] <= MIDDLE)
    return {f"decoder.layers.{n - 1}.{name}": new for _, name, n, _, new in raised}


@pytest.mark.parametrize("ranks, flags", [
    (2, ["--pipeline-model-parallel-size", "2"]), (2, TP2.split()),
], ids=["PP 2", "TP 2"])  # fmt: skip
def test_another_split_takes_the_widths_over(launcher, whole, ranks, flags):
    first, checkpoints = whole(1, *RAISING)
    more = [*train(*EVERY, *flags), "--load", checkpoints, "--ckpt-step", MIDDLE]
    run = launcher.run(*more, "--exit-interval", MIDDLE + 1, ranks=ranks)
    assert run.ok, run.log[-4000:]
    assert run.report["raised_widths"] == raised_by_then(first)
    assert "raised by --agoq-max-error: mlp.linear_fc1.output to 6 bits in layers 1-2;" in run.log
    assert_as_planned(run)
    ((_, found),) = errors(run).items()
    (layer,) = {n for _, n in found}
    before = errors(first)[3 if layer == 2 else 1]
    assert found[FC1, layer] < 0.7 * before[FC1, layer]


def test_without_probes_the_policy_holds_again(launcher, whole):
    first, checkpoints = whole(1, *RAISING)
    more = [*train(), "--load", checkpoints, "--ckpt-step", MIDDLE]
    run = launcher.run(*more)
    assert run.ok, run.log[-4000:]
    count = len(raised_by_then(first))
    assert f"this run had raised the widths of {count} tensors. Without --agoq-probe-interval" in run.log
    kept = {row["name"]: row["format"] for row in run.report["tensors"]}
    formats = {NORM1: "nf4 g64 s8", NORM2: "nf4 g64 s8", FC1: "cubic5"}
    assert all(kept[name].startswith(start) and "/" not in kept[name] for name, start in formats.items())


def test_a_new_run_from_old_weights_starts_anew(launcher, whole):
    _, checkpoints = whole(1, *RAISING)
    run = launcher.run("--load", checkpoints, "--finetune", "--train-iters", 1, *EVERY)
    assert run.ok, run.log[-4000:]
    assert run.report["raised_widths"] == {} and "raised by" not in run.log


def test_a_dry_run_plans_the_raised_widths(launcher, whole):
    _, checkpoints = whole(1, *RAISING)
    more = [*train(*EVERY), "--load", checkpoints, "--agoq-dry-run"]
    run = launcher.run(*more)
    assert run.ok, run.log[-4000:]
    assert re.search(r"raised by --agoq-max-error: mlp.linear_fc1.output to (6|8) bits in layers", run.log)
    assert "cubic6 g64 s8" in run.log or "int8 g64 s16" in run.log


def test_the_planner_counts_them(launcher, whole, tmp_path):
    """Those of the checkpoint that it is told of."""
    first, checkpoints = whole(1, *RAISING)
    held = []
    for more in ([], EVERY):
        file = tmp_path / f"plan{len(held)}.json"
        flags = ["--train-iters", 1, "--load", checkpoints, "--ckpt-step", MIDDLE, "--plan-json", file, *more]
        run = launcher.run(*flags, entry=PLANNER)
        assert run.ok, run.log[-4000:]
        plan = json.loads(file.read_text())["kinds"]["these flags"]
        held.append(plan["stages"][0]["parts"]["saved activations"])
    # A layer, 64 tokens.
    more = sum(r["bytes"] for r in first.report["raises"] if r["iteration"] <= MIDDLE)
    assert held[1] - held[0] == 64 * more > 0


def probed(policy: str, limit: str, folder: Path) -> list[str]:
    """Five iterations, each saved; a layer a time is probed."""
    return [
        *policy.split(), "--agoq-probe-interval", "1", "--agoq-probe-layers", "1", "--agoq-max-error", limit,
        "--train-iters", "5", "--save", str(folder), "--load", str(folder), "--save-interval", "1",
    ]  # fmt: skip


@pytest.mark.parametrize("policy, limit, damaged", [
    ("--agoq-activations uniform4", "0.05", True),
    ("--agoq-activations auto --agoq-activation-memory 110KiB", "0.1", False),
], ids=["the newest checkpoint is damaged", "widths by the solver, an empty tracker file"])  # fmt: skip
def test_widths_are_those_of_the_checkpoint_that_is_loaded(launcher, tmp_path, policy, limit, damaged):
    """Not of the newest, where it is damaged; and the solver's are there again beside the raised ones. Where
    Megatron finds an empty tracker file it would leave with status 0."""
    reference = launcher.run(*probed(policy, limit, tmp_path / "whole"))
    assert reference.ok and reference.report["raises"], reference.log[-4000:]
    flags = probed(policy, limit, tmp_path / "cut")
    first = launcher.run(*flags, "--exit-interval", 2)
    assert first.ok, first.log[-4000:]
    if damaged:
        shard = max((tmp_path / "cut/iter_0000002").glob("*.distcp"), key=lambda path: path.stat().st_size)
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    else:
        (tmp_path / "cut/latest_checkpointed_iteration.txt").write_text("")
    rest = launcher.run(*flags)
    assert rest.ok, rest.log[-4000:]
    assert ("going back to" in rest.log and "they hold" in rest.log) == damaged
    start = 2 if damaged else 3
    assert sorted(rest.losses()) == list(range(start, 6))
    assert rest.losses() == {i: loss for i, loss in reference.losses().items() if i >= start}
    assert rest.report["raised_widths"] == reference.report["raised_widths"]
    assert rest.report["solver"] == reference.report["solver"]
