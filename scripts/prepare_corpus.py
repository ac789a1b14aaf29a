#!/usr/bin/env python3
"""Turn folders of text files into a corpus that Megatron trains on.

    prepare_corpus.py --input DIR... --output PREFIX

writes

    PREFIX_tokenizer/                        a byte-level BPE tokenizer, as transformers loads it
    PREFIX_train_text_document.{bin,idx}     Megatron's indexed datasets
    PREFIX_valid_text_document.{bin,idx}
    PREFIX_report.json                       what was kept, dropped and why; written last

for ``--tokenizer-type HuggingFaceTokenizer --tokenizer-model PREFIX_tokenizer
--train-data-path PREFIX_train_text_document --valid-data-path PREFIX_valid_text_document``.

One file is one document. The files are read twice: once to judge them (text? a duplicate? how
large?), then, when it is known which ones stay, to tokenize them; so no more than a document a
process is in memory. Everything follows from the files' relative paths and contents alone: the
same folders give the same corpus, on any machine and with any number of workers.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "corpus"))

# Worker processes import this file anew: what is slow to import (Megatron, transformers, torch)
# stays inside the functions that only the parent calls.
import numpy as np
from corpus_documents import CorpusError, choose, examine, find_files, read_text, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

EXTENSIONS = ".py .pyi .md .rst .txt .h .hpp .c .cc .cpp .cu .cuh .rs .go .java .js .ts .sh .toml"
EXCLUDED_NAMES = ".* __pycache__ node_modules site-packages dist-packages *.egg-info *.dist-info"
END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|pad|>"
SMALLEST_VOCABULARY = 256 + 2  # every byte, and the two special tokens


# ---------------------------------------------------------------- the tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE and save it as a directory that ``AutoTokenizer`` loads offline."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT, pad_token=PADDING
    ).save_pretrained(directory)


def end_of_document_id(directory: Path) -> int:
    """Id of the token that Megatron's HuggingFace wrapper takes for the end of a document.

    Raises:
        CorpusError: not a tokenizer directory, or one that names no such token.
    """
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").is_file():
        raise CorpusError(f"--tokenizer {directory}: no tokenizer.json there (a 'fast' tokenizer).")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise CorpusError(f"--tokenizer {directory}: cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise CorpusError(f"--tokenizer {directory}: it names no eos_token, which ends a document.")
    return tokenizer.eos_token_id


@functools.cache
def _load_tokenizer(directory: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A file that happens to contain "<|endoftext|>" does not end there.
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(path: str, directory: str) -> np.ndarray:
    """Token ids of a file's text, int32 ``[tokens]``, without special tokens."""
    ids = _load_tokenizer(directory).encode(read_text(path), add_special_tokens=False).ids
    return np.asarray(ids, dtype=np.int32)


# ---------------------------------------------------------------- writing


def write_dataset(
    prefix: str, documents: Iterable[np.ndarray], end_id: int, vocab_size: int
) -> int:
    """Write one indexed dataset, every document closed by ``end_id``; returns its tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Transformer Engine is missing is no matter here
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    tokens = 0
    for ids in documents:
        builder.add_document(np.append(ids, end_id), [len(ids) + 1])
        tokens += len(ids) + 1
    builder.finalize(f"{prefix}.idx")
    return tokens


def drop_stale_indices(prefix: str) -> None:
    """Delete Megatron's cached sample indices of an earlier corpus of this name.

    Megatron finds them by the corpus's path, not its content, so they would silently be used for a
    corpus that has changed. (A folder given by --data-cache-path is out of reach here.)
    """
    cache = Path(prefix).absolute().parent / "cache" / "GPTDataset_indices"
    for description in cache.glob("*-description.txt"):
        if f"{Path(prefix).name}_" in description.read_text():
            stem = description.name.removesuffix("-description.txt")
            for stale in cache.glob(f"{stem}-*"):
                stale.unlink()


def outputs(prefix: str) -> dict[str, Path]:
    """Everything that is written, by what it is."""
    return {
        "train": Path(f"{prefix}_train_text_document"),
        "valid": Path(f"{prefix}_valid_text_document"),
        "tokenizer": Path(f"{prefix}_tokenizer"),
        "report": Path(f"{prefix}_report.json"),
    }


def prepare(args: argparse.Namespace) -> dict:
    """Do all of it; returns the report. ``args`` is what :func:`parse_arguments` returns."""
    start = time.monotonic()
    paths = check(args)
    files = find_files(args.input, _extensions(args.extensions), args.exclude.split())
    if not files:
        raise CorpusError(
            f"no files with the extensions {args.extensions} in {_join(args.input)}: "
            "see --extensions and --exclude."
        )
    examine_file = functools.partial(
        examine, max_file_bytes=args.max_file_bytes, max_line_length=args.max_line_length
    )
    with (
        _Workers(args.workers) as workers,
        tqdm(workers.map(examine_file, files), "reading", len(files), unit="file") as verdicts,
    ):
        documents, dropped = choose(verdicts, args.max_bytes)
    if not documents:
        raise CorpusError(f"none of {len(files)} files is usable text: {dict(dropped)}.")
    parts = split(documents, args.valid_fraction)

    drop_stale_indices(args.output)
    tokenizer_path = args.tokenizer or paths["tokenizer"]
    if args.tokenizer is None:
        sample, _ = choose(parts["train"], args.tokenizer_sample_bytes)
        bar = tqdm(sample, "training the tokenizer on", unit="file")
        train_tokenizer((read_text(d.path) for d in bar), args.vocab_size, tokenizer_path)
    end_id = end_of_document_id(tokenizer_path)
    vocab_size = _load_tokenizer(str(tokenizer_path)).get_vocab_size()

    splits = {}
    encode_file = functools.partial(encode, directory=str(tokenizer_path))
    with _Workers(args.workers) as workers:
        for name, part in parts.items():
            ids = workers.map(encode_file, [d.path for d in part])
            bar = tqdm(ids, f"tokenizing {name}", len(part), unit="file")
            tokens = write_dataset(str(paths[name]), bar, end_id, vocab_size) if part else 0
            size = sum(d.size for d in part)
            splits[name] = {"documents": len(part), "bytes": size, "tokens": tokens}

    size = sum(part["bytes"] for part in splits.values())
    tokens = sum(part["tokens"] for part in splits.values())
    examined = len(documents) + sum(dropped.values())
    report = {
        "settings": {k: _plain(v) for k, v in vars(args).items() if k not in _NOT_SETTINGS},
        "files_found": len(files),
        "files_beyond_max_bytes": len(files) - examined,
        "files_kept": len(documents),
        "files_dropped": dict(sorted(dropped.items())),
        "bytes": size,
        "splits": splits,
        "tokens": tokens,
        "bytes_per_token": size / tokens,
        "tokenizer": str(tokenizer_path),
        "vocab_size": vocab_size,
        "seconds": time.monotonic() - start,
    }
    paths["report"].write_text(json.dumps(report, indent=2) + "\n")
    return report


# ---------------------------------------------------------------- the command line

_NOT_SETTINGS = {"workers", "overwrite"}  # what does not change the corpus


class _Workers:
    """``map`` over processes, in order; in this process where there is only one."""

    def __init__(self, count: int):
        # "spawn": the parent may hold threads (the tokenizer's trainer), which a fork would break.
        self._pool = multiprocessing.get_context("spawn").Pool(count) if count > 1 else None

    def map(self, job, items: list) -> Iterator:
        if self._pool is None:
            return map(job, items)
        return self._pool.imap(job, items, chunksize=min(32, len(items) // 64 + 1))

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()


def _plain(value):
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _join(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))


def _extensions(text: str) -> set[str]:
    return {e if e.startswith(".") else f".{e}" for e in text.lower().replace(",", " ").split()}


def check(args: argparse.Namespace) -> dict[str, Path]:
    """Refuse what cannot work before any work is done; returns :func:`outputs`."""
    for path in args.input:
        if not path.is_dir():
            raise CorpusError(f"--input {path}: no such folder.")
    if args.tokenizer is None and not SMALLEST_VOCABULARY <= args.vocab_size <= 2**20:
        raise CorpusError(
            f"--vocab-size {args.vocab_size}: a byte-level vocabulary holds at least the 256 bytes "
            f"and 2 special tokens; choose {SMALLEST_VOCABULARY} to {2**20}."
        )
    if not 0 <= args.valid_fraction < 1:
        raise CorpusError(f"--valid-fraction {args.valid_fraction}: choose at least 0, below 1.")
    for flag in "max-bytes max-file-bytes max-line-length tokenizer-sample-bytes workers".split():
        value = getattr(args, flag.replace("-", "_"))
        if value is not None and value < 1:
            raise CorpusError(f"--{flag} {value}: must be at least 1.")
    if args.tokenizer is not None:
        end_of_document_id(args.tokenizer)
    paths = outputs(args.output)
    if not args.overwrite:
        for path in paths.values():
            files = [path, *(Path(f"{path}{suffix}") for suffix in (".bin", ".idx"))]
            if existing := [str(p) for p in files if p.exists()]:
                raise CorpusError(f"--output: {existing[0]} exists; --overwrite replaces it.")
    paths["report"].unlink(missing_ok=True)  # an interrupted run must not look complete
    paths["report"].parent.mkdir(parents=True, exist_ok=True)
    return paths


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", type=Path, nargs="+", required=True, metavar="DIR", help="folders to walk")
    add("--output", required=True, metavar="PREFIX", help="path prefix of all that is written")
    add("--extensions", default=EXTENSIONS, help="file extensions to take")
    add("--exclude", default=EXCLUDED_NAMES, help="names of files and folders to leave out (globs)")
    add("--valid-fraction", type=float, default=0.02, help="share of documents kept for validation")
    add("--max-bytes", type=int, help="stop when that much text is gathered (default: all)")
    add("--max-file-bytes", type=int, default=2**20, help="leave out larger files")
    add("--max-line-length", type=int, default=2000, help="leave out files with longer lines")
    add("--vocab-size", type=int, default=8192, help="vocabulary of the tokenizer to train")
    add("--tokenizer", type=Path, metavar="DIR", help="take this HuggingFace tokenizer instead")
    add("--tokenizer-sample-bytes", type=int, default=2**25, help="text to train the tokenizer on")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    add("--overwrite", action="store_true", help="replace an existing corpus of this name")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    try:
        report = prepare(args)
    except CorpusError as error:
        sys.exit(f"prepare_corpus.py: error: {error}")
    dropped = ", ".join(f"{n} {reason}" for reason, n in report["files_dropped"].items()) or "none"
    print(f"kept {report['files_kept']} of {report['files_found']} files (dropped: {dropped})")
    for name, part in report["splits"].items():
        print(f"{name}: {part['documents']} documents, {part['tokens']:,} tokens")
    print(
        f"{report['bytes_per_token']:.2f} bytes per token, vocabulary {report['vocab_size']}, "
        f"{report['seconds']:.1f} s; report: {outputs(args.output)['report']}"
    )


if __name__ == "__main__":
    main()
