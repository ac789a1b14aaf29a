"""Samples: their order in a run that is made longer, their masks where a corpus holds the padding token."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset as StockDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from agoq_megatron.entries.data import DatasetConfig, GPTDataset, check_length, samples_to_read, without_empty
from agoq_megatron.resuming import order
from agoq_megatron.seams import compat
from agoq_megatron.seams.refusals import UsageError

LENGTH, VOCABULARY, PAD = 16, 4000, 3


@pytest.fixture
def corpora(tmp_path, seed):
    """Two corpora of documents of random length. Every token occurs once: a sample is known by its own."""
    rng = np.random.default_rng(seed)
    prefixes, first = [], 4
    for name, documents in (("a", 60), ("b", 25)):
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for size in rng.integers(5, 30, documents):
            builder.add_document(np.arange(first, first + size), [int(size)])
            first += int(size)
        builder.finalize(f"{prefix}.idx")
        prefixes.append(prefix)
    assert first < VOCABULARY
    return prefixes


def tokenizer(pad: int = PAD, eod: int = 2):
    return SimpleNamespace(
        vocab_size=VOCABULARY,
        pad=pad,
        eod=eod,
        eos=eod,
        special_tokens_dict={},
        unique_identifiers={"pad": pad},
    )


def config(tmp_path, **given) -> DatasetConfig:
    return DatasetConfig(**{
        "random_seed": 7, "sequence_length": LENGTH, "split": "100,0,0", "reset_position_ids": False,
        "reset_attention_mask": False, "eod_mask_loss": False, "create_attention_mask": False,
        "tokenizer": tokenizer(), "path_to_cache": str(tmp_path / "cache"), "embeddings": VOCABULARY,
        "mid_level_dataset_surplus": 0.005,
    } | given)  # fmt: skip


def arguments(**given) -> Namespace:
    return Namespace(**{"dataloader_type": "single", "consumed_train_samples": 0} | given)


def text(sample: dict) -> tuple[int, ...]:
    return tuple(sample["tokens"].tolist())


def read(dataset, begin: int, end: int) -> list[tuple[int, ...]]:
    return [text(dataset[i]) for i in range(begin, end)]


def blends(corpora) -> dict:
    return {
        "one": {"blend": ([corpora[0]], None)},
        "weights": {"blend": (corpora, [0.7, 0.3])},
        "by split": {
            "blend_per_split": [(corpora, [0.7, 0.3]), ([corpora[1]], None), None], "split": None,
        },
    }  # fmt: skip


def built(kind, args, samples: int, settings) -> tuple:
    return tuple(order.builder(kind, args, (samples, 9, 0), lambda: True, settings).build())


@pytest.mark.parametrize("blend", ["one", "weights", "by split"])
def test_a_longer_run_goes_on_in_the_same_order(tmp_path, corpora, blend):
    """Over two extensions, for any number of epochs: what is left comes as it would have come."""
    settings = config(tmp_path, **blends(corpora)[blend])
    stock = BlendedMegatronDatasetBuilder(StockDataset, [100, 9, 0], lambda: True, settings).build()[0]
    args = arguments()
    first, *_ = built(GPTDataset, args, 100, settings)
    assert args.agoq_samples_drawn == [(100, 9, 0)]
    assert read(first, 0, 100) == read(stock, 0, 100)  # a run that is not made longer is Megatron's
    second, *_ = built(GPTDataset, args, 400, settings)
    third, *_ = built(GPTDataset, args, 900, settings)
    assert args.agoq_samples_drawn == [(100, 9, 0), (400, 9, 0), (900, 9, 0)]
    assert read(second, 0, 100) == read(first, 0, 100)
    assert read(third, 0, 400) == read(second, 0, 400)
    assert len(third) >= 900
    again, *_ = built(GPTDataset, arguments(agoq_samples_drawn=args.agoq_samples_drawn), 900, settings)
    assert read(again, 0, 900) == read(third, 0, 900)
    shorter, *_ = built(GPTDataset, args, 300, settings)
    assert read(shorter, 0, 300) == read(third, 0, 300)

    other = BlendedMegatronDatasetBuilder(StockDataset, [400, 9, 0], lambda: True, settings).build()[0]
    assert read(other, 0, 100) != read(first, 0, 100)  # Megatron's own order changes


def test_every_epoch_holds_every_token_once(tmp_path, corpora):
    """No sample of the epochs begun before is lost, none of them comes more often."""
    settings = config(tmp_path, **blends(corpora)["one"])
    args = arguments()
    first, *_ = built(GPTDataset, args, 100, settings)
    second, *_ = built(GPTDataset, args, 400, settings)
    both = Counter(token for sample in read(second, 0, len(first)) for token in sample)
    epochs = max(both.values())
    assert epochs >= 2
    short = [count for count in both.values() if count < epochs]
    assert sum(epochs - count for count in short) <= LENGTH  # the last, incomplete sequence
    rest = Counter(token for sample in read(second, len(first), len(second)) for token in sample)
    whole = max(rest.values())
    assert sum(whole - count for count in rest.values() if count < whole) <= LENGTH


def test_only_what_will_be_read_is_built(tmp_path, corpora, monkeypatch):
    """Megatron makes indices of a split of which nothing is asked. Another phase is no extension."""
    settings = config(tmp_path, blend=([corpora[0]], None), split="50,50,0")
    args, asked, init = arguments(), [], GPTDataset.__init__

    def counted(self, indexed, path, indices, samples, *rest):
        asked.append(samples)
        init(self, indexed, path, indices, samples, *rest)

    monkeypatch.setattr(GPTDataset, "__init__", counted)
    built(GPTDataset, args, 20, settings)
    asked.clear()
    built(GPTDataset, args, 400, settings)  # training alone grows
    assert len([samples for samples in asked if samples not in (20, 9, 0)]) == 1 and len(asked) <= 4
    args.phase_transition_iterations = [10]
    found = order.builder(GPTDataset, args, (900, 9, 0), lambda: True, settings)
    assert type(found) is BlendedMegatronDatasetBuilder
    assert args.agoq_samples_drawn == [(900, 9, 0)]


def test_validation_keeps_its_order_too(tmp_path, corpora):
    settings = config(tmp_path, blend=([corpora[0]], None), split="50,50,0")
    args = arguments()
    valid = [
        order.builder(GPTDataset, args, (50, n, 0), lambda: True, settings).build()[1] for n in (20, 200)
    ]
    assert read(valid[1], 0, 20) == read(valid[0], 0, 20)


def test_a_cyclic_loader_draws_the_same_set(tmp_path, corpora):
    """Its order is a permutation of the whole set, anew in each round."""
    settings = config(tmp_path, **blends(corpora)["one"])
    args = arguments(dataloader_type="cyclic")
    first, *_ = built(GPTDataset, args, 100, settings)
    second, *_ = built(GPTDataset, args, 400, settings)
    assert len(second) == len(first) and read(second, 0, 100) == read(first, 0, 100)


def test_with_indices_made_beforehand_the_order_is_megatrons(tmp_path, corpora, capsys):
    settings = config(tmp_path, **blends(corpora)["one"])
    args = arguments(agoq_samples_drawn=[(100, 9, 0)])
    settings.defer_npy_index_mmap = True
    found = order.builder(GPTDataset, args, (400, 9, 0), lambda: True, settings)
    assert type(found) is BlendedMegatronDatasetBuilder and found.sizes == [400, 9, 0]
    assert "WARNING" in capsys.readouterr().err


@pytest.mark.parametrize("before, now, then", [
    ([], (5, 2, 1), [(5, 2, 1)]),
    ([(5, 2, 1)], (5, 2, 1), [(5, 2, 1)]),
    ([(5, 2, 1)], (4, 2, 1), [(5, 2, 1)]),
    ([(5, 2, 1)], (4, 3, 1), [(5, 2, 1), (5, 3, 1)]),
    ([(5, 2, 1), (7, 2, 1)], (9, 2, 1), [(5, 2, 1), (7, 2, 1), (9, 2, 1)]),
    ([(5, None, 1)], (6, None, 1), [(5, None, 1), (6, None, 1)]),
    ([(5, None, 1)], (6, 2, 1), [(6, 2, 1)]),
])  # fmt: skip
def test_what_a_run_was_to_draw(before, now, then):
    assert order.grown(before, now) == then


def test_what_a_checkpoint_tells(capsys):
    """Its own record, else what Megatron would have drawn; another source of samples is named."""
    same = {name: None for name in order.SHUFFLED_BY} | {"seed": 5, "consumed_train_samples": 1200}
    args = Namespace(**same)
    order.remember(args, Namespace(**same, agoq_samples_drawn=[[4, 2, 1]]), lambda _: (9, 9, 9))
    assert args.agoq_samples_drawn == [(4, 2, 1)]
    order.remember(args, Namespace(**same), lambda _: (9, 9, 9))
    assert args.agoq_samples_drawn == [(9, 9, 9)]
    order.remember(args, Namespace(**same), lambda _: None)
    assert args.agoq_samples_drawn == []
    assert "WARNING" not in capsys.readouterr().err
    other = same | {"seed": 6, "data_path": ["1", "a"]}
    order.remember(args, Namespace(**other), lambda _: None)
    said = capsys.readouterr().err
    assert "WARNING: --seed is 5, in the checkpoint 6" in said and "first 1,200 are left out" in said
    assert "--data-path is None, in the checkpoint 1 a" in said


def test_samples_that_megatron_would_have_drawn():
    import megatron.training.training as training

    given = dict(
        train_samples=None, train_iters=10, global_batch_size=4, full_validation=False, skip_train=False,
        eval_interval=5, eval_iters=1, start_eval_at_iter=None, phase_transition_iterations=None,
    )  # fmt: skip
    stock = training.get_args
    assert "get_args" in training.get_train_valid_test_num_samples.__code__.co_names
    assert compat.samples_of(Namespace(**given)) == (40, 12, 4)
    assert compat.samples_of(Namespace(**given | {"train_samples": 33, "full_validation": True})) == (
        33,
        None,
        4,
    )
    del given["start_eval_at_iter"]  # as in a checkpoint of an older version
    assert compat.samples_of(Namespace(**given)) is None
    assert training.get_args is stock


def test_samples_of_a_run_with_another_batch_size():
    args = Namespace(
        phase_transition_iterations=None, train_iters=60, iteration=0, consumed_train_samples=0,
        global_batch_size=4, step_batch_size_schedule=None, seq_length=LENGTH, agoq_samples_drawn=[],
    )  # fmt: skip
    assert samples_to_read(args, 240) == 240
    args.iteration, args.consumed_train_samples = 20, 20 * 8  # at twice the batch size
    assert samples_to_read(args, 240) == 160 + 40 * 4
    args.step_batch_size_schedule = f"0:4 {200 * LENGTH}:8"
    assert samples_to_read(args, 240) == 200 + 30 * 8
    args.agoq_samples_drawn = None  # a new run, or none
    assert samples_to_read(args, 240) == 240
    args.agoq_samples_drawn, args.train_iters = [], None
    assert samples_to_read(args, 240) == 240


def test_a_blend_that_nothing_is_drawn_from_is_none(tmp_path, corpora):
    settings = config(tmp_path, blend=(corpora, [0.7, 0.3]), split="80,20,0")
    found = order.builder(GPTDataset, arguments(), (50, 0, 0), lambda: True, settings).build()
    assert len(found[1]) == 0
    assert without_empty(found) == [found[0], None, None]


def test_a_training_set_that_is_too_short_is_refused():
    check_length(5, 5)
    with pytest.raises(UsageError, match="has 5 samples.* needs 6.*weights"):
        check_length(5, 6)


@pytest.fixture
def padded(tmp_path, seed):
    """A corpus whose first document, the first to be read, holds the padding token; and where."""
    rng = np.random.default_rng(seed)
    prefix = str(tmp_path / "padded")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    documents = rng.integers(4, VOCABULARY, (5, LENGTH + 1))
    documents[:, [2, 7]] = PAD
    documents[rng.integers(5)] = rng.integers(4, VOCABULARY, LENGTH + 1)
    for document in documents:
        builder.add_document(document, [LENGTH + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("position_ids", [False, True])
def test_padding_in_the_first_sample_masks_that_sample_alone(tmp_path, padded, position_ids):
    """Masks are right for each sample, in any order; tokens are those of the corpus."""
    settings = config(tmp_path, blend=([padded], None), reset_position_ids=position_ids)
    (dataset, *_) = built(GPTDataset, arguments(), 5, settings)
    numbers = [*range(5), *range(5)]
    found = [dataset[number] for number in numbers]
    texts = [dataset._query_document_sample_shuffle_indices(number)[0] for number in numbers]
    assert [s["loss_mask"].tolist() for s in found] == [(t[1:] != PAD).tolist() for t in texts]
    for sample, whole in zip(found, map(torch.from_numpy, texts), strict=True):
        assert torch.equal(sample["tokens"], whole[:-1])
        keep = sample["loss_mask"].bool()
        assert torch.equal(sample["labels"][keep], whole[1:][keep])
        assert torch.equal(sample["position_ids"], torch.arange(LENGTH))
    assert dataset[None]["loss_mask"].sum() == 0


def test_a_tokenizer_without_padding(tmp_path, padded):
    settings = config(tmp_path, blend=([padded], None), tokenizer=tokenizer(None))
    (dataset, *_) = built(GPTDataset, arguments(), 5, settings)
    for number in range(5):
        whole = dataset._query_document_sample_shuffle_indices(number)[0]
        assert text(dataset[number]) == tuple(whole[:-1].tolist())


def test_a_token_without_embedding_is_not_fed(tmp_path):
    """Megatron's padding of an incomplete sequence: -1, and tokens beyond the vocabulary, become 0."""
    prefix = str(tmp_path / "short")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(np.arange(10, 10 + LENGTH + 6), [LENGTH + 6])
    builder.finalize(f"{prefix}.idx")
    for pad, fed in ((-1, 0), (VOCABULARY, 0), (PAD, PAD)):
        settings = config(
            tmp_path, blend=([prefix], None), tokenizer=tokenizer(pad), split="0,100,0",
            drop_last_partial_validation_sequence=False,
        )  # fmt: skip
        valid = order.builder(GPTDataset, arguments(), (0, None, 0), lambda: True, settings).build()[1]
        samples = {text(valid[i]): valid[i]["loss_mask"].tolist() for i in range(len(valid))}
        rest = (*range(10 + LENGTH, 16 + LENGTH), *[fed] * (LENGTH - 6))
        assert samples[rest] == [1.0] * 5 + [0.0] * (LENGTH - 5), pad
