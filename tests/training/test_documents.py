"""Runs on sequences packed of documents that do not see each other: from stock Megatron's checkpoint they go
on, in any layout, as stock does with masks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import covering
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from stock_runs import stock_runs

from agoq_megatron.entries import data

pytestmark = pytest.mark.slow

EOD = 126
MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 4 --kv-channels 64
    --group-query-attention --num-query-groups 2 --swiglu --disable-bias-linear --normalization RMSNorm
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --seq-length 48
    --max-position-embeddings 48 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --log-interval 1
    --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64 --split 100,0,0
    --eval-iters 0 --eval-interval 1000 --num-workers 0 --train-iters 20 --save-interval 2
""".split()
KINDS = {
    "reset": "--reset-attention-mask --reset-position-ids --eod-mask-loss --calculate-per-token-loss "
    "--position-embedding-type learned_absolute",
    "reset masks alone": "--reset-attention-mask --position-embedding-type rope --rotary-base 10",
    "by document": "--dataloader-inter-document-masking --position-embedding-type rope --rotary-base 10",
}
TP2 = "--tensor-model-parallel-size 2"
PP4 = "--pipeline-model-parallel-size 4"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn mlp layernorm"
LAYOUTS = {
    "one rank": (1, ""),
    "micro-batches of one": (1, "--micro-batch-size 1"),
    "TP2": (2, TP2),
    "TP2 SP": (2, f"{TP2} --sequence-parallel"),
    "PP4": (4, PP4),
    "PP2 interleaved": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "full recomputation": (1, FULL),
    "TP2 SP x PP2, selective recomputation": (
        4, f"{TP2} --sequence-parallel --pipeline-model-parallel-size 2 {SELECTIVE}",
    ),
}  # fmt: skip
CASES = [f"{kind}, {layout}" for kind in KINDS for layout in LAYOUTS]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """Documents of 1 to 30 tokens, the end's among them."""
    prefix = str(tmp_path_factory.mktemp("corpus") / "short")
    rng = np.random.default_rng(3)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for size in rng.integers(1, 31, 400):
        builder.add_document(np.append(rng.integers(0, EOD, size - 1), EOD), [int(size)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def stock(launcher, corpus, tmp_path_factory):
    words = "--data-path", corpus
    return stock_runs(launcher, tmp_path_factory, lambda kind: (*MODEL, *KINDS[kind].split(), *words))


def go_on(launcher, stock, corpus, case: str, *flags: object):
    """From stock Megatron's second iteration."""
    kind, _, layout = case.partition(", ")
    ranks, of_layout = LAYOUTS[layout]
    words = *MODEL, *KINDS[kind].split(), *of_layout.split(), "--data-path", corpus
    run = launcher.run(*words, "--load", stock(kind).folder, *flags, ranks=ranks, tiny=False, timeout=200)
    assert run.ok, run.log[-4000:]
    return run, stock(kind).history


@pytest.mark.supports("attention mask by document", "packed sequences by document")
@pytest.mark.supports("checkpoint exchanged with stock Megatron")
@pytest.mark.parametrize("case", covering(CASES, {"reset, one rank", "reset, TP2 SP", "by document, PP4"}))
def test_trains_as_stock_does(launcher, stock, corpus, case):
    """With everything kept exactly, in FP32: all that is left of 20 losses, on one rank."""
    steps = 20 if case == "reset, one rank" else 5
    run, reference = go_on(
        launcher, stock, corpus, case, "--agoq-activations", "off", "--exit-interval", steps
    )
    assert run.losses().keys() == set(range(3, steps + 1))
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=1e-5 if iteration == 3 else 1e-4)
        assert run.grad_norms()[iteration] == pytest.approx(
            reference[iteration][1], rel=1e-5 if iteration == 3 else 1e-3
        )


@pytest.mark.parametrize("layout", covering(["one rank", "TP2 SP", "full recomputation"], {"TP2 SP"}))
def test_packed_as_megatron_packs(launcher, stock, corpus, layout):
    """See ``packed_entry.py``: the layers get what other scripts give them."""
    ranks, of_layout = LAYOUTS[layout]
    words = *MODEL, *KINDS["by document"].split(), *of_layout.split(), "--data-path", corpus
    reference, folder, _ = stock("by document")
    run = launcher.run(
        *words, "--load", folder, "--agoq-activations", "off", "--exit-interval", "4", "--agoq-report",
        folder / "packed.json", ranks=ranks, tiny=False, entry=Path(__file__).with_name("packed_entry.py"),
    )  # fmt: skip
    assert run.ok, run.log[-4000:]
    found = {it["iteration"]: it for it in json.loads((folder / "packed.json").read_text())["train"]}
    assert found.keys() == {3, 4}
    for iteration, it in found.items():
        assert it["lm loss"] == pytest.approx(reference[iteration][0], rel=1e-4)
        assert it["grad norm"] == pytest.approx(reference[iteration][1], rel=1e-3)


def test_masks_matter(launcher, stock, corpus):
    """The comparison above has something to see."""
    kind = "by document"
    without = KINDS[kind].replace("--dataloader-inter-document-masking", "")
    words = *MODEL, *without.split(), "--data-path", corpus
    run = launcher.run(
        *words, "--load", stock(kind).folder, "--agoq-activations", "off", "--exit-interval", "3", tiny=False
    )
    assert run.ok, run.log[-4000:]
    assert abs(run.losses()[3] / stock(kind).history[3][0] - 1) > 1e-4


@pytest.mark.supports("attention mask by document", "packed sequences by document", part="gradients")
@pytest.mark.supports("attention mask by document", "packed sequences by document", part="states")
@pytest.mark.parametrize("case", covering(CASES, {"by document, TP2 SP"}))
def test_in_few_bits(launcher, stock, corpus, case):
    """By the default policy, gradients and states in 8 bits: what is kept is what was planned, and what is
    compared in training stays within the usual errors."""
    run, reference = go_on(
        launcher, stock, corpus, case, "--bf16", "--agoq-grad-bits", "8", "--agoq-optimizer-bits", "8",
        "--no-load-optim", "--use-distributed-optimizer", "--exit-interval", "4", "--agoq-loss-chunks", "3",
    )  # fmt: skip
    for iteration, loss in run.losses().items():
        assert loss == pytest.approx(reference[iteration][0], rel=0.02)
    for row in run.report["tensors"]:
        assert row["measured_bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=0.01), row


def dataset(tokens, tokenizer_eod: int = 2, **config):
    """One sample, without a corpus."""
    its = object.__new__(data.GPTDataset)
    its.config = SimpleNamespace(
        tokenizer=SimpleNamespace(eod=tokenizer_eod), reset_position_ids=True, reset_attention_mask=True,
        eod_mask_loss=True, create_attention_mask=False, add_extra_token_to_sequence=True, embeddings=0,
        inter_document_masking=False, sequence_length=len(tokens) - 1, **config,
    )  # fmt: skip
    its._pad_token_id = -1
    its.masks_and_position_ids_are_cacheable = its.masks_and_position_ids_are_cached = False
    stock = lambda self, idx: (np.array(tokens), None, [len(tokens)])  # noqa: E731
    return its, stock


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_documents_are_those_of_megatrons_mask(rng, monkeypatch, share):
    """Of random tokens, in which the end's may come anywhere, also last, or twice in turn."""
    s = 40
    tokens = torch.randint(3, 9, (s + 1,), generator=rng)
    tokens[torch.rand(s + 1, generator=rng) < share] = 2
    its, stock = dataset(tokens.tolist())
    monkeypatch.setattr(data.gpt_dataset.GPTDataset, "_query_document_sample_shuffle_indices", stock)
    sample = its[0]
    mask, loss_mask, positions = _get_ltor_masks_and_position_ids(tokens[:-1], 2, True, True, True, True)
    bounds = sample["cu_seqlens"].tolist()
    assert len(bounds) == s + 1 and sample["cu_seqlens"].dtype == torch.int32
    ends = sorted(set(bounds[1:]))
    seen = torch.zeros(s, s, dtype=torch.bool)
    for start, end in zip([0, *ends], ends, strict=False):
        seen[start:end, start:end] = True
    assert torch.equal(seen.tril(), ~mask[0])
    assert torch.equal(sample["position_ids"], positions) and torch.equal(sample["loss_mask"], loss_mask)
    assert "attention_mask" not in sample
    assert sample["max_seqlen"] == max(b - a for a, b in zip([0, *ends], ends, strict=False))


def test_bounds_of_a_batch():
    bounds = torch.tensor([[0, 2, 5, 5, 5, 5], [0, 5, 5, 5, 5, 5]], dtype=torch.int32)
    params = data.packed_params(bounds)
    assert params.cu_seqlens_q.tolist() == [0, 2, 5, 10] and params.max_seqlen_q == 5
    assert params.qkv_format == "thd"
