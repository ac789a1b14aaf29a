"""The corpus of convergence.py in three parts: for base models, for continued runs, for validation."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))

import numpy as np
from convergence_study import PRESETS, ConvergenceError, replace_file
from quickstart import prepare_corpus


def corpus_parts(args: argparse.Namespace) -> dict:
    """Prepare the corpus and cut it into three parts, unless that is done.

    Returns:
        "tokenizer" and "prefix" (paths), and "tokens" of each part: "base" (also for runs from
        scratch), "continue", and "valid".
    """
    folder = args.out.absolute() / "corpus"
    done = folder / "parts.json"
    if done.exists():
        return json.loads(done.read_text())
    preset = PRESETS[args.preset]
    if args.corpus:
        reports = sorted(args.corpus.absolute().glob("*_report.json"))
        if len(reports) != 1:
            raise ConvergenceError(
                f"--corpus {args.corpus}: holds {len(reports)} corpora of prepare_corpus.py (files "
                "*_report.json); give a folder with one."
            )
        source = str(reports[0]).removesuffix("_report.json")
    else:
        source = str(folder / "text")
        prepare_corpus(args.input, preset["corpus"], Path(source))
    parts = {
        "tokenizer": f"{source}_tokenizer",
        "prefix": str(folder / "part"),
        "tokens": cut_corpus(
            source,
            folder / "part",
            preset["continue_share"],
            preset["model"]["seq-length"],
            preset["micro_batch"],
        ),
    }
    replace_file(done, parts)
    return parts


def cut_corpus(source: str, part: Path, share: float, length: int, batch: int) -> dict[str, int]:
    """Write ``part``_base, _continue and _valid from the two datasets of a prepared corpus.

    Megatron shuffles documents, joins them and cuts them into sequences, by --seed. For training that
    is what a data order means; the last ``share`` of the documents is new to the base model in every
    order. But all runs should be judged on the same validation sequences. So the validation text is
    cut here into documents of one sequence each, a multiple of ``batch`` of them, and one token more:
    a sequence's last label is the next one's first token. (That one label in ``length`` belongs to
    unrelated text, in all runs alike.)

    With a ``share`` of 1 there is no part for base models.

    Returns:
        Tokens of each part.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Transformer Engine is missing is no matter here
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    train = IndexedDataset(f"{source}_train_text_document")
    valid = IndexedDataset(f"{source}_valid_text_document")
    sizes = np.asarray(train.sequence_lengths, dtype=np.int64)
    first = int(np.searchsorted(np.cumsum(sizes), (1 - share) * sizes.sum()))
    text = np.concatenate([valid[i] for i in range(len(valid))])
    kept = (len(text) - 1) // (length * batch) * length * batch
    if not kept:
        raise ConvergenceError(
            f"{source}: its validation part holds {len(text):,} tokens, less than the {batch} "
            f"sequences of {length} that one validation step takes; prepare a larger corpus."
        )
    documents = {
        "base": (train[i] for i in range(first)),
        "continue": (train[i] for i in range(first, len(sizes))),
        "valid": np.split(text[: kept + 1], range(length, kept + 1, length)),
    }
    if not first:
        del documents["base"]
    part.parent.mkdir(parents=True, exist_ok=True)
    tokens = {}
    for name, those in documents.items():
        builder = IndexedDatasetBuilder(f"{part}_{name}.bin", dtype=train.index.dtype)
        tokens[name] = 0
        for document in those:
            builder.add_document(document, [len(document)])
            tokens[name] += len(document)
        builder.finalize(f"{part}_{name}.idx")
    return tokens
