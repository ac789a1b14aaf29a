"""Every way of splitting the model trains as one rank does: 5 losses (10 with --exhaustive), in FP32.

All runs start from one checkpoint, written by one rank and resharded by Megatron as it is loaded: under
another layout Megatron would draw other initial weights.
"""

import pytest
from launch import covering

pytestmark = pytest.mark.slow

MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --kv-channels 64
    --group-query-attention --num-query-groups 2 --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --seq-length 48 --max-position-embeddings 48
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --log-interval 1 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64
    --eval-iters 0 --eval-interval 1000 --num-workers 0
""".split()

TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"
# Small buckets: each layer must wait for its own weights.
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 20000"
ALL = "TP2 SP x PP2 interleaved x DP2, all"
LAYOUTS = {
    "TP2": (2, TP2),
    "TP2 SP": (2, f"{TP2} --sequence-parallel"),
    "PP2": (2, PP2),
    "PP2 interleaved": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "PP2 by layout": (2, f"{PP2} --pipeline-model-parallel-layout Et|t*3,L"),
    "PP2 interleaved by layout": (2, f"{PP2} --pipeline-model-parallel-layout E|t|tt|tL"),
    "DP2 distributed optimizer, overlap": (2, OVERLAP),
    "TP2 x PP2": (4, f"{TP2} {PP2}"),
    ALL: (
        8,
        f"{TP2} --sequence-parallel {PP2} --num-layers-per-virtual-pipeline-stage 1 {OVERLAP}",
    ),
}
POLICIES = {"off": 1e-4, "agoq": 1e-3}
RECOMPUTE = {
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective --recompute-modules core_attn mlp layernorm",
}


@pytest.fixture(scope="module")
def train(launcher, tmp_path_factory, request):
    """Train from the common checkpoint; returns the run."""
    steps = 10 if request.config.getoption("--exhaustive") else 5
    start = tmp_path_factory.mktemp("start")
    run = launcher.run(*MODEL, "--train-iters", "1", "--save", start, "--save-interval", "1", tiny=False)
    assert run.ok, run.log[-4000:]

    def train(policy: str, *flags: str, ranks: int = 1):
        run = launcher.run(
            *MODEL, "--train-iters", str(steps), "--load", start, "--finetune",
            "--agoq-activations", policy, *flags, ranks=ranks, tiny=False, timeout=200,
        )  # fmt: skip
        assert run.ok, run.log[-4000:]
        assert len(run.losses()) == steps
        return run

    return train


@pytest.fixture(scope="module")
def one_rank(train):
    return {policy: train(policy).losses() for policy in POLICIES}


def assert_as_planned(run) -> None:
    measured = run.report["saved_bytes_per_token_layer"]
    assert measured == pytest.approx(run.report["planned_bytes_per_token_layer"], rel=0.01)


def worst_difference(losses: dict, reference: dict) -> float:
    return max(abs(losses[i] - reference[i]) / reference[i] for i in reference)


@pytest.mark.supports(
    "pipeline layout by string", "tensor parallelism", "sequence parallelism", "pipeline parallelism",
    "interleaved pipeline", "data parallelism", "distributed optimizer", "overlapped gradient reduction",
    "overlapped parameter gather", "FP32", "Adam",
)  # fmt: skip
@pytest.mark.parametrize(
    "case",
    covering(
        [f"{layout}-{policy}" for layout in LAYOUTS for policy in POLICIES],
        # The last one's "off": test_the_loss_in_parts
        {"TP2 SP-off", "TP2 SP-agoq", "PP2 interleaved by layout-off", f"{ALL}-agoq"},
    ),
)
def test_layout_matches_one_rank(train, one_rank, case):
    layout, _, policy = case.rpartition("-")
    ranks, flags = LAYOUTS[layout]
    run = train(policy, *flags.split(), ranks=ranks)
    worst = worst_difference(run.losses(), one_rank[policy])
    print(f"{layout}, {policy}: worst relative loss difference {worst:.1e}")
    assert worst < POLICIES[policy]
    reference = one_rank[policy]
    assert reference[max(reference)] < reference[1] - 0.05  # it trains
    assert_as_planned(run)


def test_policies_differ(one_rank):
    """The comparison can see a policy: 'agoq' is near 'off', but not the same numbers."""
    worst = worst_difference(one_rank["agoq"], one_rank["off"])
    print(f"agoq against off on one rank: {worst:.1e}")
    assert 1e-7 < worst < 0.05


@pytest.mark.supports("full recomputation", "selective recomputation")
@pytest.mark.parametrize("layout", covering(["TP2 SP", "PP2 interleaved"], {"TP2 SP"}))
@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recomputation_composes(train, one_rank, kind, layout):
    """Exact with 'off'; with 'agoq' near it, and the kept bytes are the planned ones."""
    ranks, flags = LAYOUTS[layout]
    flags = f"{flags} {RECOMPUTE[kind]}".split()
    exact = train("off", *flags, ranks=ranks)
    assert worst_difference(exact.losses(), one_rank["off"]) < 1e-4
    packed = train("agoq", *flags, ranks=ranks)
    assert worst_difference(packed.losses(), one_rank["off"]) < 0.05
    for run in (exact, packed):
        assert_as_planned(run)
    assert packed.report["saved_bytes_per_token_layer"] < (0.5 * exact.report["saved_bytes_per_token_layer"])


@pytest.mark.supports("MLP in pieces")
def test_the_mlp_in_pieces(train, one_rank):
    """Megatron's --mlp-chunks-for-training, with a length that the number does not divide."""
    for policy, tolerance in POLICIES.items():
        run = train(policy, "--mlp-chunks-for-training", "5")
        assert worst_difference(run.losses(), one_rank[policy]) < tolerance
        assert_as_planned(run)


@pytest.mark.parametrize("layout", covering(["one rank", "TP2", ALL], {"one rank", ALL}))
def test_the_loss_in_parts(train, one_rank, layout):
    """--agoq-loss-chunks: a number that does not divide the tokens, weights that are gathered late."""
    ranks, flags = LAYOUTS.get(layout, (1, ""))
    run = train("off", *flags.split(), "--agoq-loss-chunks", "5", ranks=ranks)
    assert worst_difference(run.losses(), one_rank["off"]) < POLICIES["off"]
    assert_as_planned(run)
