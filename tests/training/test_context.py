"""Sequences cut over ranks (context parallelism) train as one rank with all of it does, in FP32.

All runs start from one checkpoint, or go on from it. Stock Megatron's local layers have no context
parallelism to compare with.
"""

from __future__ import annotations

import pytest
from checkpoints import assert_same_tensors
from launch import covering

from tests.training.test_parallel import OVERLAP, POLICIES, assert_as_planned, worst_difference

pytestmark = pytest.mark.slow

MODEL = """
    --num-layers 2 --hidden-size 128 --ffn-hidden-size 192 --num-attention-heads 8 --kv-channels 32
    --group-query-attention --num-query-groups 4 --swiglu --normalization RMSNorm
    --disable-bias-linear --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --seq-length 48 --max-position-embeddings 48
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --log-interval 1 --mock-data
    --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64
    --eval-iters 0 --eval-interval 1000 --num-workers 0
""".split()
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn mlp layernorm"


def shared(ranks: int, kind: str, *more: str) -> str:
    return " ".join((f"--context-parallel-size {ranks} --cp-comm-type {kind}", *more))


HIERARCHY = "--hierarchical-context-parallel-sizes 2 2"
LAYOUTS = {
    "p2p, TP2 SP": (4, shared(2, "p2p", TP2, "--sequence-parallel")),
    "p2p of 4": (4, shared(4, "p2p")),
    "p2p, PP2 interleaved": (4, shared(2, "p2p", PP2, "--num-layers-per-virtual-pipeline-stage 1")),
    "p2p, DP2 overlap": (4, shared(2, "p2p", OVERLAP)),
    "p2p, full recomputation": (2, shared(2, "p2p", FULL)),
    "all_gather, TP2": (4, shared(2, "all_gather", TP2)),
    "all_gather of 4, selective recomputation": (4, shared(4, "all_gather", SELECTIVE)),
    "a2a, TP2": (4, shared(2, "a2a", TP2)),
    "a2a of 4, full recomputation": (4, shared(4, "a2a", FULL)),
    "a2a+p2p": (4, shared(4, "a2a+p2p", HIERARCHY)),
    "a2a+p2p, TP2 SP": (8, shared(4, "a2a+p2p", HIERARCHY, TP2, "--sequence-parallel")),
}
MODELS = {
    "": "",
    "norms of heads": "--qk-layernorm",
    "sinks": "--softmax-type learnable",
    "learned positions, loss in parts": "--position-embedding-type learned_absolute --agoq-loss-chunks 3",
}
WITH_WINDOWS = "--window-size 9,0 --window-attn-skip-freq 2"
WITH_DOCUMENTS = "--reset-attention-mask"


@pytest.fixture(scope="module")
def train(launcher, tmp_path_factory):
    """Train from the common checkpoint of a model; returns the run."""
    starts = {}

    def train(policy: str, flags: str = "", ranks: int = 1, model: str = ""):
        if model not in starts:
            starts[model] = tmp_path_factory.mktemp("start")
            run = launcher.run(
                *MODEL, *model.split(), "--train-iters", "1", "--save", starts[model], "--save-interval", "1",
                tiny=False,
            )  # fmt: skip
            assert run.ok, run.log[-4000:]
        run = launcher.run(
            *MODEL, *model.split(), "--train-iters", "4", "--load", starts[model], "--finetune",
            "--agoq-activations", policy, *flags.split(), ranks=ranks, tiny=False, timeout=200,
        )  # fmt: skip
        assert run.ok, run.log[-4000:]
        assert len(run.losses()) == 4
        return run

    return train


@pytest.fixture(scope="module")
def one_rank(train):
    known = {}

    def run(policy: str, model: str = ""):
        if (policy, model) not in known:
            known[policy, model] = train(policy, model=model)
        return known[policy, model]

    return run


@pytest.mark.supports("context parallelism")
@pytest.mark.parametrize(
    "case",
    covering(
        [f"{policy}: {layout}" for layout in LAYOUTS for policy in POLICIES],
        {"agoq: p2p, TP2 SP"},
    ),
)
def test_as_one_rank(train, one_rank, case):
    """Losses, norms of gradients, and the bytes that are kept."""
    policy, layout = case.split(": ")
    ranks, flags = LAYOUTS[layout]
    run, reference = train(policy, flags, ranks), one_rank(policy)
    assert worst_difference(run.losses(), reference.losses()) < POLICIES[policy]
    assert worst_difference(run.grad_norms(), reference.grad_norms()) < 10 * POLICIES[policy]
    assert_as_planned(run)


@pytest.mark.parametrize("layout", covering(["p2p, TP2 SP", "all_gather, TP2", "a2a+p2p"], set()))
@pytest.mark.parametrize("model", [model for model in MODELS if model])
def test_of_other_models(train, one_rank, model, layout):
    ranks, flags = LAYOUTS[layout]
    for policy, tolerance in POLICIES.items():
        run = train(policy, flags, ranks, MODELS[model])
        assert worst_difference(run.losses(), one_rank(policy, MODELS[model]).losses()) < tolerance
        assert_as_planned(run)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["all_gather, TP2", "a2a, TP2", "p2p, TP2 SP", "a2a+p2p"])
@pytest.mark.parametrize("model", [WITH_WINDOWS, WITH_DOCUMENTS], ids=["windows", "documents"])
def test_windows_and_documents(train, one_rank, model, layout):
    if model == WITH_WINDOWS and "p2p" in layout:
        pytest.skip("windows are refused in a ring")
    ranks, flags = LAYOUTS[layout]
    for policy, tolerance in POLICIES.items():
        run = train(policy, flags, ranks, model)
        assert worst_difference(run.losses(), one_rank(policy, model).losses()) < tolerance
        assert_as_planned(run)


def test_goes_on_bit_for_bit_and_with_other_ranks(launcher, tmp_path_factory):
    """Three saved runs: whole, gone on from its middle, and gone on by one rank."""
    flags = (
        *MODEL, "--train-iters", "4", "--save-interval", "2", "--agoq-activations", "off",
        "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable",
    )  # fmt: skip
    of_two = shared(2, "p2p").split()
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "again", "alone")]
    whole = launcher.run(*flags, *of_two, "--save", folders[0], ranks=2, tiny=False)
    assert whole.ok, whole.log[-4000:]
    middle = "--load", folders[0], "--ckpt-step", "2"
    again = launcher.run(*flags, *of_two, *middle, "--save", folders[1], ranks=2, tiny=False)
    assert again.ok, again.log[-4000:]
    assert_same_tensors(folders[0], folders[1], 4)
    alone = launcher.run(*flags, *middle, "--save", folders[2], tiny=False)
    assert alone.ok, alone.log[-4000:]
    assert worst_difference(alone.losses(), {i: whole.losses()[i] for i in (3, 4)}) < 1e-4


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["p2p", "all_gather", "a2a"])
def test_eight_bits_of_everything(train, one_rank, kind):
    """16-bit weights, 8-bit gradients and states, over ranks that share sequences and others."""
    eight = "--bf16 --agoq-grad-bits 8 --agoq-optimizer-bits 8 --use-distributed-optimizer"
    run = train("agoq", f"{eight} {shared(2, kind)}", 4)
    alone = train("agoq", eight)
    assert worst_difference(run.losses(), alone.losses()) < 0.02
    assert_as_planned(run)


BAD = {
    "a window in a ring": (f"{shared(2, 'p2p')} --window-size 4,0", "--window-size"),
    "documents in a window": (
        f"{shared(2, 'all_gather')} --reset-attention-mask --window-size 4,0",
        "use a2a",
    ),
    "several kinds": (shared(2, "p2p a2a"), "--cp-comm-type p2p a2a"),
    "an unknown kind": (shared(2, "ring"), "carried are"),
    "no sizes": (shared(2, "a2a+p2p"), "--hierarchical-context-parallel-sizes"),
    "other sizes": (shared(2, "a2a+p2p", HIERARCHY), "their product"),
    "sizes of nothing": (shared(4, "p2p", HIERARCHY), "leave it out"),
    "too few heads": (shared(8, "a2a"), "key/value heads"),
    "a length": (f"{shared(2, 'p2p')} --seq-length 46", "--seq-length 46"),
    "a length of parts": (
        f"{shared(2, 'p2p')} --sequence-parallel --tensor-model-parallel-size 16",
        "24 tokens",
    ),
    "gradients of nobody": ("--agoq-context-grad-bits 8", "leave it out"),
    "gradients that stay": (f"{shared(2, 'a2a')} --agoq-context-grad-bits 8", "leave it out"),
    "gradients without scales": (
        f"{shared(2, 'p2p')} --agoq-context-grad-bits 8 --kv-channels 24 --num-query-groups 1",
        "24 features",
    ),
    "latents": (f"{shared(2, 'p2p')} --multi-latent-attention", "--multi-latent-attention"),
    "more tokens": (f"{shared(2, 'p2p')} --mtp-num-layers 1", "--mtp-num-layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    from types import SimpleNamespace

    from agoq_megatron.checks.context import check_context
    from agoq_megatron.seams.refusals import UsageError

    words, expected = BAD[case]
    args = SimpleNamespace(
        context_parallel_size=1, cp_comm_type=["p2p"], hierarchical_context_parallel_sizes=None,
        tensor_model_parallel_size=1, seq_length=48, sequence_parallel=False, num_attention_heads=8,
        num_query_groups=4, group_query_attention=True, window_size=None, reset_attention_mask=False,
        dataloader_inter_document_masking=False, sft=False, multi_latent_attention=False, mtp_num_layers=None,
        agoq_context_grad_bits=16, kv_channels=32, hidden_size=128,
    )  # fmt: skip
    for flag in words.split("--")[1:]:
        name, *values = flag.split()
        numbers = [int(v) if v.isdigit() else v for v in values] or [True]
        listed = name in ("cp-comm-type", "hierarchical-context-parallel-sizes")
        setattr(args, name.replace("-", "_"), numbers if listed else numbers[0])
    with pytest.raises(UsageError, match=expected):
        check_context(args)
