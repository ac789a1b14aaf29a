"""The parts of a prepared corpus hold what they should, and nothing twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from convergence_corpus import cut_corpus
from convergence_study import ConvergenceError


def write_corpus(folder: Path, random, words: int) -> list[list[int]]:
    """A prepared corpus's two datasets, of made-up documents; returns those of training."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for name, count in (("train", 40), ("valid", 5)):
        builder = IndexedDatasetBuilder(f"{folder}/x_{name}_text_document.bin", dtype=np.uint16)
        documents = [random.integers(0, 500, random.integers(1, words)) for _ in range(count)]
        for document in documents:
            builder.add_document(document, [len(document)])
        builder.finalize(f"{folder}/x_{name}_text_document.idx")
        if name == "train":
            train = [d.tolist() for d in documents]
    return train


def test_cutting_a_corpus(random, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    train = write_corpus(tmp_path, random, words=400)
    source = str(tmp_path / "x")
    tokens = cut_corpus(source, tmp_path / "new" / "part", 0.35, length=16, batch=4)
    parts = {name: IndexedDataset(str(tmp_path / "new" / f"part_{name}")) for name in tokens}
    read = {name: [part[i].tolist() for i in range(len(part))] for name, part in parts.items()}
    assert read["base"] + read["continue"] == train
    assert {name: sum(map(len, those)) for name, those in read.items()} == tokens
    total = tokens["base"] + tokens["continue"]
    assert abs(tokens["continue"] - 0.35 * total) <= max(map(len, train))

    whole = IndexedDataset(f"{source}_valid_text_document")
    text = [token for i in range(len(whole)) for token in whole[i].tolist()]
    assert (tokens["valid"] - 1) % (16 * 4) == 0
    assert 0 <= len(text) - tokens["valid"] < 16 * 4
    assert [token for document in read["valid"] for token in document] == text[: tokens["valid"]]
    assert {len(document) for document in read["valid"][:-1]} == {16}
    assert len(read["valid"][-1]) == 1
    with pytest.raises(ConvergenceError, match="prepare a larger corpus"):
        cut_corpus(source, tmp_path / "part", 0.35, length=4096, batch=4)
