"""Megatron's distributed checkpoints (``--ckpt-format torch_dist``), read and written a tensor at a time.

Such a checkpoint is one of torch.distributed.checkpoint: tensors by name with their global shapes, in pieces
as the ranks held them, and an entry ``common_state`` with the run's arguments. Layers of one kind are one
tensor with the layer as its first axis. Nothing in it depends on tensor or pipeline parallelism, so neither
needs to be known to read it, and what is written here loads at any.
"""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from agoq_megatron.convert.weights import EMBEDDING, Weight
from agoq_megatron.resuming.checksums import find_damage, is_complete
from agoq_megatron.resuming.resume import TRACKER, folder_name
from agoq_megatron.seams.refusals import UsageError

RELEASE = "release"
_COMMON = "common_state/shard_0_1"
_LAYERS = "decoder.layers."
_LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def find_checkpoint(load: Path, step: int | None = None) -> Path:
    """The folder of one iteration.

    Args:
        load: what was given to ``--save``, or the folder of an iteration itself.
        step: which iteration; the latest, if None.

    Raises:
        UsageError: there is no such checkpoint, or it is of another format.
    """
    if not load.is_dir():
        raise UsageError(f"--load: {load} is no folder.")
    folder = load
    tracker = load / TRACKER
    if step is not None:
        folder = load / folder_name(step)
    elif tracker.is_file():
        latest = tracker.read_text(errors="replace").strip()
        if latest != RELEASE and not latest.isdecimal():
            raise UsageError(
                f"--load: {tracker} holds no iteration. Name one with --ckpt-step; saved there: "
                f"{_saved(load)}."
            )
        folder = load / (RELEASE if latest == RELEASE else folder_name(int(latest)))
    if not folder.is_dir():
        raise UsageError(f"--load: there is no {folder}; saved there: {_saved(load)}.")
    if not is_complete(folder):
        raise UsageError(
            f"--load: {folder} is no whole checkpoint in the format torch_dist (Megatron's default). Save it "
            "with --ckpt-format torch_dist."
        )
    return folder


def _saved(load: Path) -> str:
    return ", ".join(sorted(p.name for p in load.glob("iter_*"))) or "none"


def check_files(folder: Path) -> None:
    """Compare the files of one iteration with their checksums, where it has them: all are read.

    Raises:
        UsageError: they are damaged; the message names the files.
    """
    damage, _ = find_damage(folder)
    if damage:
        raise UsageError(
            f"--load: {folder} is damaged: {'; '.join(damage[:4])}. Name another iteration with --ckpt-step."
        )


class CheckpointReader:
    """Reads tensors and arguments of one iteration's folder.

    Attributes:
        args: Megatron's arguments of the run that wrote it.
        iteration: when.
    """

    def __init__(self, folder: Path):
        from megatron.core.dist_checkpointing import load_common_state_dict

        self.folder = folder
        common = load_common_state_dict(str(folder))
        if not isinstance(common.get("args"), Namespace):
            raise UsageError(f"--load: {folder} does not hold the arguments of its run.")
        self.args: Namespace = common["args"]
        self.iteration: int = common.get("iteration", 0)
        self._storage = dcp.FileSystemReader(folder)
        metadata = self._storage.read_metadata()
        self._storage.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _of_the_optimizer(name)
        }

    def names(self) -> set[str]:
        """Of all tensors but the optimizer's."""
        return set(self._tensors)

    def embedding_rows(self) -> int:
        """Size of the vocabulary as it is stored, with padding."""
        if EMBEDDING not in self._tensors:
            raise UsageError(f"--load: {self.folder} has no {EMBEDDING}: no model of Megatron's GPT.")
        return self._tensors[EMBEDDING].size[0]

    def dtype(self, weight: Weight) -> torch.dtype:
        return self._tensors[self._place(weight)[0]].properties.dtype

    def check(self, weights: Sequence[Weight]) -> None:
        """Compare the tensors with what the model should have.

        Raises:
            UsageError: one is missing, has another shape, or is left over, by its name.
        """
        left = self.names()
        for weight in weights:
            name, offsets, sizes = self._place(weight)
            left.discard(name)
            stored = tuple(self._tensors[name].size)
            # The vocabulary is padded: there the first axis may be longer.
            padded = weight.layer is None and stored[1:] == sizes[1:] and stored[0] >= sizes[0]
            if stored[len(offsets) - len(weight.shape) :] != weight.shape and not padded:
                raise UsageError(
                    f"--load: {name} has the shape {stored}; by its run's arguments {weight.shape} is due."
                )
        if left:
            raise UsageError(
                f"--load: Hugging Face's class has no place for {', '.join(sorted(left)[:5])}"
                f"{' and others' if len(left) > 5 else ''}."
            )

    def read(self, weights: Sequence[Weight]) -> list[Tensor]:
        """The tensors, whole (of a padded vocabulary: the rows that stand for tokens)."""
        targets, items = {}, []
        for number, weight in enumerate(weights):
            name, offsets, sizes = self._place(weight)
            targets[number] = torch.empty(sizes, dtype=self.dtype(weight))
            box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for item in create_read_items_for_chunk_list(name, self._tensors[name], [box]):
                items.append((number, item))
        for number, target in targets.items():
            covered = sum(item.lengths.numel() for n, item in items if n == number)
            if covered != target.numel():
                raise UsageError(
                    f"--load: {self.folder} holds {covered} of the {target.numel()} numbers of "
                    f"{weights[number].name}."
                )
        planner = _ReadPlanner(targets, items)
        self._storage.read_data(LoadPlan([item for _, item in items]), planner).wait()
        return [targets[number].view(weight.shape) for number, weight in enumerate(weights)]

    def _place(self, weight: Weight) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Where a weight lies: name, offsets and sizes of the box."""
        shape = weight.shape
        if weight.layer is None:
            name, offsets, sizes = weight.name, (0,) * len(shape), shape
        elif weight.name in self._tensors:
            name, offsets, sizes = weight.name, (weight.layer, *(0,) * len(shape)), (1, *shape)
        else:  # layers that Megatron did not take for alike have names of their own
            name = weight.name.replace(_LAYERS, f"{_LAYERS}{weight.layer}.", 1)
            offsets, sizes = (0,) * len(shape), shape
        if name not in self._tensors:
            raise UsageError(f"--load: {self.folder} has no {weight.name}, which the model needs.")
        return name, offsets, sizes


class _ReadPlanner(LoadPlanner):
    """Puts what is read into tensors that the caller has made."""

    def __init__(self, targets: dict[int, Tensor], items: list):
        self._targets = targets
        self._of = {id(item): number for number, item in items}

    def set_up_planner(self, *args, **kwargs) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("the reader is called with a plan")

    create_global_plan = finish_plan = load_bytes = create_local_plan

    def resolve_tensor(self, read_item) -> Tensor:
        target = self._targets[self._of[id(read_item)]]
        offsets, lengths = read_item.dest_offsets, read_item.lengths
        return target[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]

    def commit_tensor(self, read_item, tensor: Tensor) -> None:
        pass


def _of_the_optimizer(name: str) -> bool:
    return name.startswith(("optimizer", "chained_"))


@dataclass(frozen=True)
class Source:
    """A tensor that is made when its turn to be written comes.

    Attributes:
        weight: which.
        dtype: of the tensor.
        make: gives it.
    """

    weight: Weight
    dtype: torch.dtype
    make: Callable[[], Tensor]


def write_checkpoint(folder: Path, sources: Sequence[Source], layers: int, args: Namespace) -> None:
    """Write a checkpoint without optimizer state, of iteration 0.

    Megatron takes it by ``--load`` as it takes a released model: weights only, training starts at the first
    iteration.

    Args:
        folder: an empty folder, which becomes a checkpoint folder with ``release`` in it.
        sources: the model's tensors.
        layers: number of layers.
        args: Megatron's arguments to store.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    # Each linear layer has an entry for Transformer Engine's FP8 state, empty without it.
    known = {source.weight.name for source in sources}
    objects = {
        f"{_LAYERS}{name}._extra_state/shard_{i}_{layers}": None
        for name in _LINEAR
        if f"{_LAYERS}{name}.weight" in known
        for i in range(layers)
    }
    objects[_COMMON] = common
    release = folder / RELEASE
    planner = _WritePlanner(sources, objects, layers)
    dcp.save({}, storage_writer=dcp.FileSystemWriter(release), planner=planner, no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(release))
    (folder / TRACKER).write_text(RELEASE)


class _WritePlanner(SavePlanner):
    """A plan from shapes alone: a tensor is made when the writer asks for it. The writer keeps the last one
    of each name, so a layer and the embeddings are in memory."""

    def __init__(self, sources: Sequence[Source], objects: dict[str, object], layers: int):
        self._make: dict[MetadataIndex, Callable[[], Tensor]] = {}
        self._objects = objects
        self._items = []
        for source in sources:
            weight, shape = source.weight, source.weight.shape
            offsets = torch.Size((0,) * len(shape))
            sizes = size = torch.Size(shape)
            if weight.layer is not None:
                offsets = torch.Size((weight.layer, *offsets))
                sizes, size = torch.Size((1, *shape)), torch.Size((layers, *shape))
            data = TensorWriteData(
                ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=source.dtype), size
            )
            index = MetadataIndex(weight.name, offsets)
            self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            self._make[index] = lambda source=source, sizes=sizes: source.make().view(sizes)
        self._items += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans):
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], data)
            return data
        # The index as planned: the global plan has added a number to it, which equality ignores.
        return self._make[write_item.index]()
