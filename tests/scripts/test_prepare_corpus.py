"""scripts/prepare_corpus.py on made-up folders, read back through Megatron."""

from __future__ import annotations

import json
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import prepare_corpus
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from prepare_corpus import CorpusError

WORDS = "def return self value for in range import tensor saved bits group äöü 漢字 🙂".split()


def make_text(random_: random.Random, lines: int) -> str:
    def line() -> str:
        return "    " * random_.randrange(3) + " ".join(random_.choices(WORDS, k=6)) + "\n"

    return "".join(line() for _ in range(lines))


@pytest.fixture
def tree(tmp_path, seed):
    """A folder of 40 good files in nested folders, and their texts by path."""
    random_ = random.Random(seed)
    texts = {}
    for i in range(40):
        folder = tmp_path / "tree" / "abc"[i % 3] / f"deep{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"file{i}.{random_.choice(['py', 'md', 'txt', 'h'])}"
        texts[path] = f"{i}\n" + make_text(random_, random_.randrange(1, 60))
        path.write_bytes(texts[path].encode())
    return SimpleNamespace(path=tmp_path / "tree", texts=texts)


def prepare(tree_path, prefix, *more: str) -> dict:
    argv = ["--input", str(tree_path), "--output", str(prefix), "--workers", "1"]
    argv += ["--vocab-size", "400", "--valid-fraction", "0.25", *more]
    return prepare_corpus.prepare(prepare_corpus.parse_arguments(argv))


def documents(prefix, split: str) -> list[np.ndarray]:
    dataset = IndexedDataset(f"{prefix}_{split}_text_document")
    assert len(dataset.document_indices) == len(dataset) + 1  # one sequence a document
    return [dataset[i].copy() for i in range(len(dataset))]  # views die with the dataset


def decoded(prefix, split: str) -> list[str]:
    """Texts of a split's documents, each checked to end in the end-of-document token and to hold
    no other."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{prefix}_tokenizer/tokenizer.json")
    end = tokenizer.token_to_id(prepare_corpus.END_OF_DOCUMENT)
    texts = []
    for ids in documents(prefix, split):
        assert ids.dtype == np.uint16
        assert ids[-1] == end and end not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False))
    return texts


def test_texts_survive_and_what_is_no_text_is_dropped(tree, tmp_path):
    some = next(iter(tree.texts))
    bad = {
        "copy.py": tree.texts[some].encode(),
        "crlf.py": tree.texts[some].replace("\n", "\r\n").encode(),  # the same text
        "nul.txt": b"text with a \0 in it",
        "latin1.txt": "na\xefve".encode("latin-1"),
        "empty.py": b"",
        "blank.md": b" \n\t\n",
        "minified.py": b"x" * 2001,
        "large.txt": b"word " * 400_000,
    }
    for name, data in bad.items():
        (tree.path / name).write_bytes(data)
    (tree.path / "dangling.py").symlink_to(tree.path / "nowhere")
    # Never looked at: another extension, an excluded folder, a hidden file.
    (tree.path / "image.png").write_bytes(b"\x89PNG")
    (tree.path / "__pycache__").mkdir()
    (tree.path / "__pycache__" / "cached.py").write_text("cached = 1")
    (tree.path / ".hidden.py").write_text("hidden = 1")

    prefix = tmp_path / "out" / "c"
    report = prepare(tree.path, prefix)
    assert report["files_dropped"] == {
        "binary": 1,
        "duplicate": 2,
        "empty": 2,
        "long_lines": 1,
        "not_utf8": 1,
        "too_large": 1,
        "unreadable": 1,
    }
    train, valid = decoded(prefix, "train"), decoded(prefix, "valid")
    assert train and valid
    assert sorted(train + valid) == sorted(tree.texts.values())

    assert report == json.loads((tmp_path / "out" / "c_report.json").read_text())
    assert report["files_kept"] == 40 and report["files_found"] == 40 + len(bad) + 1
    assert report["bytes"] == sum(len(text.encode()) for text in tree.texts.values())
    for name, texts in (("train", train), ("valid", valid)):
        written = documents(prefix, name)
        assert report["splits"][name]["documents"] == len(texts)
        assert report["splits"][name]["tokens"] == sum(map(len, written))
    assert report["bytes_per_token"] == pytest.approx(report["bytes"] / report["tokens"])


def test_a_corpus_depends_on_nothing_but_the_files(tree, tmp_path):
    """Not on the number of workers, the folder's place, or the order of the file system."""
    prepare(tree.path, tmp_path / "one")
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(tree.path, moved)
    prepare(moved, tmp_path / "two", "--workers", "2")
    for suffix in ("train_text_document.bin", "train_text_document.idx", "valid_text_document.bin"):
        one, two = (tmp_path / f"{name}_{suffix}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), suffix


def test_documents_keep_their_side_when_the_corpus_grows(tree, tmp_path):
    prepare(tree.path, tmp_path / "small")
    for i in range(20):
        (tree.path / f"new{i}.py").write_text(f"new = {i}\n")
    prepare(tree.path, tmp_path / "grown")
    for side in ("train", "valid"):
        assert set(decoded(tmp_path / "small", side)) <= set(decoded(tmp_path / "grown", side))


def test_a_special_token_in_a_file_is_text(tree, tmp_path):
    text = f"end = '{prepare_corpus.END_OF_DOCUMENT}{prepare_corpus.PADDING}'\n"
    (tree.path / "special.py").write_text(text)
    prepare(tree.path, tmp_path / "c")
    assert text in decoded(tmp_path / "c", "train") + decoded(tmp_path / "c", "valid")


def test_max_bytes(tree, tmp_path):
    report = prepare(tree.path, tmp_path / "c", "--max-bytes", "5000")
    assert 2 <= report["files_kept"] < 40
    assert 2000 < report["bytes"] <= 5000
    assert report["files_beyond_max_bytes"] == 40 - report["files_kept"]


def test_an_existing_tokenizer_is_taken(tree, tmp_path):
    prepare(tree.path, tmp_path / "first")
    tokenizer = tmp_path / "first_tokenizer"
    report = prepare(tree.path, tmp_path / "second", "--tokenizer", str(tokenizer))
    assert report["tokenizer"] == str(tokenizer)
    assert not (tmp_path / "second_tokenizer").exists()
    name = "train_text_document.bin"
    assert (tmp_path / f"first_{name}").read_bytes() == (tmp_path / f"second_{name}").read_bytes()


def test_overwriting_drops_megatrons_cached_indices(tree, tmp_path):
    prepare(tree.path, tmp_path / "c")
    cache = tmp_path / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    for stem, prefix in (("aa-GPTDataset-train", "c"), ("bb-GPTDataset-train", "other")):
        description = json.dumps({"dataset_path": str(tmp_path / f"{prefix}_train_text_document")})
        (cache / f"{stem}-description.txt").write_text(description)
        (cache / f"{stem}-document_index.npy").write_bytes(b"index")
    prepare(tree.path, tmp_path / "c", "--overwrite")
    assert sorted(os.listdir(cache)) == [
        "bb-GPTDataset-train-description.txt",
        "bb-GPTDataset-train-document_index.npy",
    ]


def test_errors_name_the_flag(tree, tmp_path):
    def refused(match: str, *more: str, path=tree.path) -> None:
        with pytest.raises(CorpusError, match=match):
            prepare(path, tmp_path / "c", *more)
        assert not (tmp_path / "c_report.json").exists()

    refused("--input .*missing: no such folder", path=tmp_path / "missing")
    refused("--vocab-size 257", "--vocab-size", "257")
    refused("--valid-fraction 1.0", "--valid-fraction", "1")
    refused("--max-bytes 0", "--max-bytes", "0")
    refused("--workers 0", "--workers", "0")
    refused("--extensions", "--extensions", ".nothing")
    refused("--tokenizer .*no tokenizer.json", "--tokenizer", str(tree.path))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    refused("--tokenizer .*cannot be loaded", "--tokenizer", str(tmp_path / "broken"))
    (tmp_path / "empty").mkdir()
    refused("no files", path=tmp_path / "empty")
    (tmp_path / "empty" / "one.py").write_text(" ")
    refused("none of 1 files is usable text", path=tmp_path / "empty")
    (tmp_path / "empty" / "one.py").write_text("one = 1")
    refused("single document", path=tmp_path / "empty")


def test_an_existing_corpus_is_not_replaced_unasked(tree, tmp_path):
    prepare(tree.path, tmp_path / "c")
    before = (tmp_path / "c_report.json").read_bytes()
    with pytest.raises(CorpusError, match="--overwrite"):
        prepare(tree.path, tmp_path / "c")
    assert (tmp_path / "c_report.json").read_bytes() == before


def test_megatron_reads_it(tree, tmp_path, monkeypatch):
    """Through its own tokenizer wrapper, offline, and its GPTDataset."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from megatron.core.datasets import utils
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    monkeypatch.setattr(utils, "compile_helpers", lambda: None)
    report = prepare(tree.path, tmp_path / "c")
    tokenizer = MegatronTokenizer.from_pretrained(
        tokenizer_path=report["tokenizer"], metadata_path={"library": "huggingface"}
    )
    assert tokenizer.vocab_size == report["vocab_size"]
    ends = {int(ids[-1]) for ids in documents(tmp_path / "c", "train")}
    assert ends == {tokenizer.eod}
    text = "def f(x):\n    return x  # ü\n"
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend_per_split=[
            ([str(tmp_path / f"c_{split}_text_document")], None) for split in ("train", "valid")
        ]
        + [None],
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    train, valid, test = BlendedMegatronDatasetBuilder(
        GPTDataset, [64, 8, 0], lambda: True, config
    ).build()
    assert test is None and len(train) >= 64 and len(valid) >= 8
    stream = np.concatenate(documents(tmp_path / "c", "train"))
    pairs = set(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))
    for i in range(8):
        tokens, labels = train[i]["tokens"].tolist(), train[i]["labels"].tolist()
        assert len(tokens) == 32 and tokens[1:] == labels[:-1]
        inside = [p for p in zip(tokens, labels, strict=True) if p[0] != tokenizer.eod]
        assert set(inside) <= pairs
