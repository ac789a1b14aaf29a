"""Write a Hugging Face model as a checkpoint that training starts from.

    python -m agoq_megatron.convert.from_hf --input DIR --output CKPT

and then, at any tensor and pipeline parallelism,

    torchrun ... pretrain_gpt_agoq.py $(cat CKPT/megatron_flags.txt) --pretrained-checkpoint CKPT \\
        --load RUN --save RUN ...

which starts from CKPT where RUN holds no checkpoint yet, and goes on from RUN where it does. (``--load CKPT``
does too, but then a run that is started again starts from CKPT again.)
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from agoq_megatron.convert.hf_store import ModelReader, copy_tokenizer, load_tokenizer
from agoq_megatron.convert.loading import read_model
from agoq_megatron.convert.megatron_store import RELEASE, Source, write_checkpoint
from agoq_megatron.convert.output import check_output, quiet_imports, run_command, whole_folder
from agoq_megatron.convert.weights import Weight
from agoq_megatron.seams.refusals import UsageError

FLAGS = "megatron_flags.txt"
VOCABULARY_MULTIPLES = 128, 1024
"""Megatron pads a vocabulary to a multiple of 128 times the tensor-parallel ranks. A model's rows stay as
they are where they are a multiple of the first (Qwen2.5's 151,936); others grow to one of the second."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="from_hf", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--input", type=Path, required=True, help="folder of a Hugging Face model")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    return parser.parse_args(argv)


def convert(options: argparse.Namespace) -> list[str]:
    """Import one model. Returns the flags with which Megatron builds it.

    Raises:
        UsageError: it cannot be imported, or not to this place; nothing was written.
    """
    if not options.input.is_dir():
        raise UsageError(f"--input: {options.input} is no folder. (Models are not downloaded here.)")
    check_output(options.output, options.overwrite, made_by_us=RELEASE)
    with ModelReader(options.input) as reader:
        row, model, weights = read_model(reader)
        sources = [_source(reader, weight) for weight in weights]
        with whole_folder(options.output) as folder:
            tokenizer = _tokenizer(options.input, folder, options.output, model.vocabulary)
            args = argparse.Namespace(
                **model.megatron_args(),
                **{flag.lstrip("-").replace("-", "_"): value for flag, value in tokenizer.items()},
                # Megatron asks a checkpoint's arguments for these.
                tensor_model_parallel_size=1,
                pipeline_model_parallel_size=1,
                consumed_train_samples=0,
                consumed_valid_samples=0,
                no_save_optim=True,
                no_save_rng=True,
                ckpt_format="torch_dist",
                # And to_hf for this, as long as no run has saved it with arguments of its own.
                hf_model_type=row.model_type,
            )
            write_checkpoint(folder, sources, model.layers, args)
            flags = model.flags() + [str(word) for pair in tokenizer.items() for word in pair]
            (folder / FLAGS).write_text(shlex.join(flags) + "\n")
    print(
        f"{options.output}: {row.hf_class}, {sum(w.numel for w in weights):,} parameters in "
        f"{sources[0].dtype}. Flags of the model, in {options.output / FLAGS}:\n{shlex.join(flags)}\n"
        "(--use-checkpoint-args reads them from the checkpoint; Megatron's own scripts leave some out, as "
        "--norm-epsilon, --use-rope-scaling and --qk-layernorm: there, pass the flags.)"
    )
    return flags


def _source(reader: ModelReader, weight: Weight) -> Source:
    def make():
        return weight.join(reader.read(weight.parts)).contiguous()

    return Source(weight, reader.dtype(weight.parts), make)


def _tokenizer(source: Path, folder: Path, final: Path, vocabulary: int) -> dict[str, str | int]:
    """Copy the tokenizer; the flags of tokenizer and vocabulary."""
    if not copy_tokenizer(source, folder / "tokenizer"):
        print(f"{source} has no tokenizer: training needs tokens of another source, as these flags assume.")
        return {"--tokenizer-type": "NullTokenizer", "--vocab-size": vocabulary}
    tokens = len(load_tokenizer(folder / "tokenizer", "--input"))
    flags = {
        "--tokenizer-type": "HuggingFaceTokenizer",
        "--tokenizer-model": str(final.resolve() / "tokenizer"),
    }
    if tokens > vocabulary:
        raise UsageError(f"--input: the tokenizer has {tokens} tokens, the model rows for {vocabulary}.")
    if tokens < vocabulary:
        # The model would get a row for each of the tokenizer's tokens only.
        enough, usual = VOCABULARY_MULTIPLES
        rows = vocabulary if vocabulary % enough == 0 else -(-vocabulary // usual) * usual
        flags["--padded-vocab-size"] = rows
    return flags


def main() -> None:
    quiet_imports()
    convert(parse())


if __name__ == "__main__":
    run_command(main, "from_hf")
