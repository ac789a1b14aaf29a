"""A Hugging Face model's folder: safetensors files, config, tokenizer."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from agoq_megatron.seams.refusals import UsageError

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IGNORED = "rotary_emb.inv_freq"  # a constant that old files hold


class ModelReader:
    """Tensors of a folder, from one safetensors file or from several with an index.

    Attributes:
        config: ``config.json``.
    """

    def __init__(self, folder: Path, flag: str = "--input"):
        """``flag`` named the folder; errors begin with it."""
        from safetensors import SafetensorError, safe_open

        self.folder, self.flag = folder, flag
        if not (folder / CONFIG).is_file():
            raise UsageError(f"{flag}: {folder} has no config.json: no folder of a Hugging Face model.")
        self.config = _read_json(folder / CONFIG, flag)
        if (folder / INDEX).is_file():
            index = _read_json(folder / INDEX, flag).get("weight_map")
            if not isinstance(index, dict):
                raise UsageError(f"{flag}: {folder / INDEX} has no weight_map.")
            if wrong := [
                name for name, file in index.items() if not isinstance(file, str) or Path(file).name != file
            ]:
                raise UsageError(f"{flag}: {folder / INDEX} names no file of this folder for {wrong[0]}.")
            files = sorted(set(index.values()))
        elif (folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            raise UsageError(
                f"{flag}: {folder} has no safetensors files. If it has others, load it with transformers "
                "and write it by save_pretrained(), which makes such files."
            )
        self._stack = contextlib.ExitStack()
        self._file_of = {}
        for file in files:
            if not (folder / file).is_file():
                raise UsageError(f"{flag}: {folder / file}, which the index names, is missing.")
            try:
                opened = self._stack.enter_context(safe_open(folder / file, framework="pt"))
            except SafetensorError as problem:  # a download that was cut, say
                raise UsageError(f"{flag}: {folder / file} cannot be read: {problem}.") from problem
            if twice := self._file_of.keys() & opened.keys():
                raise UsageError(f"{flag}: {folder} holds {min(twice)} twice, the second time in {file}.")
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    def __enter__(self) -> ModelReader:
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def dtype(self, names: Iterable[str]) -> torch.dtype:
        """Of tensors that will be one.

        Raises:
            UsageError: they differ, or are of a format that Megatron's weights do not have.
        """
        names = list(names)
        found = {self._slice(name).get_dtype() for name in names}
        if len(found) > 1 or not found <= _DTYPES.keys():
            raise UsageError(
                f"{self.flag}: {', '.join(names)} are of {', '.join(sorted(found))}; one of "
                f"{', '.join(_DTYPES)} is needed."
            )
        return _DTYPES[found.pop()]

    def check_layers(self, layers: int) -> None:
        """Before a list of all their tensors is made.

        Raises:
            UsageError: there cannot be so many.
        """
        if layers > len(self._file_of):
            raise UsageError(
                f"config.json: num_hidden_layers is {layers}; {self.folder} holds {len(self._file_of)} "
                "tensors in all."
            )

    def check(self, parts: dict[str, tuple[int, ...]], tied: bool) -> None:
        """Compare the tensors with what the model should have.

        Raises:
            UsageError: one is missing, has another shape, or is left over, by its name.
        """
        for name, shape in parts.items():
            stored = tuple(self._slice(name).get_shape())
            if stored != shape:
                raise UsageError(
                    f"{self.flag}: {name} has the shape {stored}; by config.json {shape} is due."
                )
        known = parts.keys() | ({LM_HEAD} if tied else set())
        left = [name for name in self._file_of if name not in known and not name.endswith(_IGNORED)]
        if left:
            raise UsageError(f"{self.flag}: the model has no place for {', '.join(sorted(left)[:5])}.")
        if tied and LM_HEAD in self._file_of:
            head, embedding = self.read((LM_HEAD, EMBED))
            if head.dtype != embedding.dtype or not torch.equal(head, embedding):
                raise UsageError(
                    f"{self.flag}: tie_word_embeddings is true in config.json, and {LM_HEAD} differs from "
                    f"{EMBED}. transformers 4 and 5 compute different things then: put false there, or take "
                    "the tensor out."
                )

    def read(self, names: Iterable[str]) -> list[Tensor]:
        return [self._file_of[name].get_tensor(name) for name in names]

    def _slice(self, name: str):
        if name not in self._file_of:
            raise UsageError(f"{self.flag}: {self.folder} has no {name}, which the model needs.")
        return self._file_of[name].get_slice(name)


def _read_json(path: Path, flag: str) -> dict:
    """
    Raises:
        UsageError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as problem:
        raise UsageError(f"{flag}: {path} cannot be read: {problem}.") from problem
    if not isinstance(found, dict):
        raise UsageError(f"{flag}: {path} holds no JSON object.")
    return found


def shards(sizes: Sequence[int], limit: int) -> list[range]:
    """Cut a list of things of these sizes into runs of at most ``limit`` (one that is larger is alone)."""
    cuts, total = [0], 0
    for number, size in enumerate(sizes):
        if total and total + size > limit:
            cuts.append(number)
            total = 0
        total += size
    cuts.append(len(sizes))
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


class ModelWriter:
    """Writes safetensors files, of which the number is known beforehand, and their index."""

    def __init__(self, folder: Path, files: int):
        self._folder, self._files = folder, files
        self._map: dict[str, str] = {}
        self._bytes = 0

    def add(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write file ``number`` (from 0)."""
        from safetensors.torch import save_file

        name = SINGLE if self._files == 1 else f"model-{number + 1:05d}-of-{self._files:05d}.safetensors"
        save_file(tensors, self._folder / name, metadata={"format": "pt"})
        (self._folder / name).chmod(0o644)  # save_file lets only the owner read
        self._map |= dict.fromkeys(tensors, name)
        self._bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def finish(self, config: dict) -> None:
        if self._files > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._map.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (self._folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files; returns their names."""
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if present:
        target.mkdir(exist_ok=True)
    for name in present:
        shutil.copyfile(source / name, target / name)
    return present


def load_tokenizer(folder: Path, flag: str):
    """transformers' tokenizer of a folder.

    Raises:
        UsageError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as problem:  # transformers raises many kinds
        text = " ".join(str(problem).split())[:300]
        raise UsageError(f"{flag}: transformers cannot load a tokenizer from {folder}: {text}") from problem
