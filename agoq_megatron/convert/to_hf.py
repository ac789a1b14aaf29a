"""Write a run's checkpoint as a Hugging Face model.

    python -m agoq_megatron.convert.to_hf --load CKPT --output DIR

CKPT is what ``--save`` named, of a run with any tensor and pipeline parallelism. DIR then holds
``model*.safetensors``, ``config.json`` and, where the run had one of Hugging Face's format, the tokenizer.
The optimizer's state stays behind: a run goes on from Megatron's checkpoint, not from this one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from agoq_megatron.convert.architecture import Architecture
from agoq_megatron.convert.families import FAMILIES, Family
from agoq_megatron.convert.hf_store import CONFIG, ModelWriter, copy_tokenizer, load_tokenizer, shards
from agoq_megatron.convert.megatron_config import architecture_from_args
from agoq_megatron.convert.megatron_store import CheckpointReader, check_files, find_checkpoint
from agoq_megatron.convert.output import check_output, quiet_imports, run_command, whole_folder
from agoq_megatron.convert.weights import model_weights
from agoq_megatron.seams.refusals import UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="to_hf", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--load", type=Path, required=True, help="checkpoint folder (what --save named)")
    parser.add_argument("--ckpt-step", type=int, help="iteration to export (default: the latest)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    parser.add_argument("--tokenizer", type=Path, help="its folder (default: the run's --tokenizer-model)")
    parser.add_argument(
        "--vocab-size", type=int, help="rows of the embedding to export (default: the tokenizer's tokens)"
    )
    parser.add_argument(
        "--model-type", choices=FAMILIES, help="architecture to write, where several hold the model"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="convert the weights (default: as stored)")
    parser.add_argument(
        "--no-checksums", dest="checksums", action="store_false",
        help="do not read all files first to compare them with their checksums",
    )  # fmt: skip
    parser.add_argument("--max-shard-gb", type=float, default=5, help="size of a file, in 1e9 bytes")
    return parser.parse_args(argv)


def convert(options: argparse.Namespace) -> None:
    """Export one checkpoint.

    Raises:
        UsageError: it cannot be exported, or not to this place; nothing was written.
    """
    if options.max_shard_gb <= 0:
        raise UsageError("--max-shard-gb: a positive number of 1e9 bytes.")
    check_output(options.output, options.overwrite, made_by_us=CONFIG)
    checkpoint = find_checkpoint(options.load, options.ckpt_step)
    if options.checksums:
        check_files(checkpoint)
    reader = CheckpointReader(checkpoint)
    tokenizer_folder = _tokenizer_folder(options, reader.args)
    tokenizer = None if tokenizer_folder is None else load_tokenizer(tokenizer_folder, "--tokenizer")
    model = architecture_from_args(reader.args, _vocabulary(options, reader, tokenizer))
    row = _family(options, model, reader.args)
    weights = model_weights(model, row.layer)
    reader.check(weights)
    stored = reader.dtype(weights[0])
    dtype = DTYPES[options.dtype] if options.dtype else stored
    name = next((name for name, value in DTYPES.items() if value == dtype), None)
    if name is None:
        raise UsageError(f"--dtype: the weights are stored as {stored}; choose one of {', '.join(DTYPES)}.")
    tokens = {}
    if tokenizer is not None:
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    files = shards([w.numel * dtype.itemsize for w in weights], int(options.max_shard_gb * 1e9))
    with whole_folder(options.output) as folder:
        writer = ModelWriter(folder, len(files))
        for number, run in enumerate(files):
            some = weights[run.start : run.stop]
            tensors = {}
            for weight, tensor in zip(some, reader.read(some), strict=True):
                parts = zip(weight.parts, weight.split(tensor), strict=True)
                tensors |= {name: part.to(dtype).contiguous() for name, part in parts}
            writer.add(number, tensors)
        writer.finish(model.hf_config(name, row.model_type, **tokens))
        copied = [] if tokenizer_folder is None else copy_tokenizer(tokenizer_folder, folder)
    print(
        f"{options.output}: {row.hf_class} (transformers {row.since} or newer), "
        f"iteration {reader.iteration}, {sum(w.numel for w in weights):,} parameters in {name}, {len(files)} "
        f"file{'s' * (len(files) > 1)}; tokenizer: {', '.join(copied) or 'none'}. The optimizer's state is "
        "not exported."
    )


def _family(options: argparse.Namespace, model: Architecture, args: argparse.Namespace) -> Family:
    """The row of the table to write: as told, as from_hf found it, or the first that holds the model."""
    if options.model_type is not None:
        return model.family(options.model_type)
    rows = {row.model_type: row for row in model.families()}
    came_as = getattr(args, "hf_model_type", None)
    if came_as in rows:
        return rows[came_as]
    if len(rows) > 1:
        first, *others = rows
        print(f"Written as {first}; {', '.join(others)} would compute the same (--model-type).")
    return model.family()


def _tokenizer_folder(options: argparse.Namespace, args: argparse.Namespace) -> Path | None:
    """Where the tokenizer's files are; None if the run had none of this format."""
    if options.tokenizer is not None:
        if not options.tokenizer.is_dir():
            raise UsageError(f"--tokenizer: {options.tokenizer} is no folder.")
        return options.tokenizer
    if args.tokenizer_type != "HuggingFaceTokenizer":
        print(f"The run's tokenizer, {args.tokenizer_type}, has no Hugging Face form: none is exported.")
        return None
    folder = Path(args.tokenizer_model)
    if not folder.is_dir():
        raise UsageError(
            f"--tokenizer: the run's --tokenizer-model {args.tokenizer_model} is no folder here. Say where "
            "its files are."
        )
    return folder


def _vocabulary(options: argparse.Namespace, reader: CheckpointReader, tokenizer) -> int:
    """Rows of the embedding that stand for a token; Megatron pads them to a multiple."""
    args, stored = reader.args, reader.embedding_rows()
    if options.vocab_size is not None:
        rows, whose = options.vocab_size, "--vocab-size"
    elif tokenizer is not None:
        rows, whose = len(tokenizer), "--tokenizer"
    elif args.tokenizer_type == "NullTokenizer":
        rows, whose = args.vocab_size, "the run's --vocab-size"
    else:
        print(f"The padding of the vocabulary stays ({stored} rows): no tokenizer to count.")
        rows, whose = stored, "the checkpoint"
    if not 0 < rows <= stored:
        raise UsageError(f"{whose}: {rows} tokens, but the model has {stored} rows for them.")
    return rows


def main() -> None:
    quiet_imports()
    convert(parse())


if __name__ == "__main__":
    run_command(main, "to_hf")
