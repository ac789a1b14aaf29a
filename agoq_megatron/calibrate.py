"""Measure, on your model and data, what each saved tensor costs the gradient in each width, layer by layer.

    torchrun --nproc-per-node N -m agoq_megatron.calibrate --calibrate-output FILE.json MEGATRON FLAGS
    python -m agoq_megatron.calibrate --calibrate-output FILE.json MEGATRON FLAGS      # on one rank

Takes the flags of the training run, and its parallel sizes. Give a checkpoint with --load: the errors of a
model at its start are not those of a trained one. A few micro-batches run exactly through the whole model,
and then each layer runs again by itself, once for each tensor and width. Errors are relative L2 against the
exact gradients: of all parameters of the layer together, and of the gradient that it hands on. They are in
the run's own dtype: with --bf16 its rounding is in them too, without it nothing but the quantizer differs.
Dropout is off, and rounding is to the nearest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from agoq_megatron.seams import compat

compat.silence_missing_accelerators()
if not torch.cuda.is_available():
    from agoq_megatron.seams import cpu  # before Megatron, whose imports read what it sets

from megatron.core import mpu  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from megatron.training.checkpointing import checkpoint_exists, load_checkpoint  # noqa: E402
from megatron.training.global_vars import set_global_variables  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from megatron.training.utils import print_rank_0  # noqa: E402

from agoq_megatron.autograd.cross_entropy import vocab_parallel_cross_entropy  # noqa: E402
from agoq_megatron.autograd.recompute import quantized_checkpoint  # noqa: E402
from agoq_megatron.entries import command_line, training  # noqa: E402
from agoq_megatron.entries.data import datasets_provider  # noqa: E402
from agoq_megatron.entries.specs import model_config_from_args  # noqa: E402
from agoq_megatron.modules.sites import gated  # noqa: E402
from agoq_megatron.planning import replay, sensitivity  # noqa: E402
from agoq_megatron.seams.devices import compare_devices  # noqa: E402
from agoq_megatron.seams.refusals import UsageError  # noqa: E402

SETTLED = [
    *"--attention-dropout 0 --hidden-dropout 0 --agoq-activations off --agoq-rounding policy".split(),
    *"--no-load-optim --no-load-rng".split(),
    *"--no-gradient-accumulation-fusion --no-check-for-nan-in-loss-and-grad --rerun-mode disabled".split(),
    *("--wandb-project", ""),
]
"""Flags that come after the user's: here are no gradient buffers, only ``.grad``, and nothing is logged."""
UNUSED = ("tensorboard_dir", "agoq_activation_memory", "agoq_gpu_memory", "agoq_sensitivities")
"""Of the user's flags."""

FP16_LOSS_SCALE = 2.0**16
SECONDS_BETWEEN_LINES = 3.0


# --- The model and the batches --------------------------------------------------------------------


def build_model(args) -> tuple[list[torch.nn.Module], int | None]:
    """This rank's model chunks, not wrapped for training, and the iteration of their checkpoint or None."""
    config = model_config_from_args(args)
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunks = builder.build_distributed_models(groups, wrap_with_ddp=False)
    if not any(checkpoint_exists(folder) for folder in (args.load, args.pretrained_checkpoint) if folder):
        return chunks, None
    return chunks, load_checkpoint(chunks, None, None)[0]


def batches(args, count: int, vp_stage: int | None) -> Iterator[dict[str, torch.Tensor]] | None:
    """This data-parallel rank's micro-batches, ``[b, s]`` tensors by name; None where nothing is read.

    From the validation data, or where there are none from the training data.
    """
    size, ranks, rank = args.micro_batch_size, args.data_parallel_size, mpu.get_data_parallel_rank()
    train, valid, _ = datasets_provider([count * ranks * size] * 2 + [0], vp_stage)
    samples = train if valid is None else valid
    if samples is None:
        return None

    def read() -> Iterator[dict[str, torch.Tensor]]:
        for batch in range(count):
            start = (batch * ranks + rank) * size
            mine = [samples[start + i] for i in range(size)]
            yield {key: torch.stack([torch.as_tensor(s[key]) for s in mine]) for key in mine[0]}

    return read()


def exact_calls(args, chunks: list[torch.nn.Module], count: int) -> dict[int, list[replay.Call]]:
    """Run ``count`` micro-batches exactly and record the calls of all layers of this rank."""
    models = [unwrap_model(chunk) for chunk in chunks]
    layers = [layer for model in models for layer in model.decoder.layers]
    for layer in layers:
        layer.set_policy(replay.EXACT)
    config = models[0].config
    total = count
    if len(chunks) > 1:  # an interleaved schedule takes whole groups of them
        total += -count % config.microbatch_group_size_per_vp_stage
    config.grad_scale_func = (lambda loss: loss * FP16_LOSS_SCALE) if args.fp16 else None
    stages = range(len(chunks)) if args.virtual_pipeline_model_parallel_size else [None]
    data = [batches(args, total, stage) for stage in stages]
    decoders = [model.decoder for model in models]
    with replay.recorded(layers, count) as calls, replay.recomputed_layers(decoders):
        get_forward_backward_func()(
            forward_step_func=training.forward_step, data_iterator=data, model=chunks, num_microbatches=total,
            seq_length=args.seq_length, micro_batch_size=args.micro_batch_size, forward_only=False,
        )  # fmt: skip
    for chunk in chunks:
        chunk.zero_grad(set_to_none=True)
    return calls


# --- The measurement ------------------------------------------------------------------------------


def measure(args, chunks: list[torch.nn.Module], count: int) -> dict[int, dict]:
    """The errors of this rank's layers by their number, as ``layer_entry`` has them.

    Raises:
        UnusableGradients: the exact gradients are zero or not finite.
    """
    print_rank_0(f"calibrate: {count} micro-batches a data-parallel rank through the whole model")
    calls = exact_calls(args, chunks, count)
    layers = [layer for chunk in chunks for layer in unwrap_model(chunk).decoder.layers]
    groups = replay.Groups(mpu.get_tensor_model_parallel_group(), mpu.get_data_parallel_group())
    tried = sensitivity.variants(unwrap_model(chunks[0]).config)
    found, done, start, said = {}, 0, time.monotonic(), 0.0

    def tick(variant: replay.OneTensor) -> None:
        nonlocal done, said
        done, now = done + 1, time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES:
            said = now
            print_rank_0(
                f"calibrate: layer {len(found) + 1} of {len(layers)} on this rank, {variant.name}: {done} of "
                f"{len(tried) * len(layers)} in {now - start:.0f} s"
            )

    for layer in layers:
        errors = replay.measure_layer(layer, calls.pop(layer.layer_number), tried, groups, tick)
        found[layer.layer_number] = sensitivity.layer_entry(tried, errors)
    return found


def gathered(args, chunks: list[torch.nn.Module], count: int) -> dict[str, dict]:
    """The errors of all layers of the model, on every rank.

    Raises:
        UsageError: the exact gradients of some layer cannot be used.
    """
    try:
        mine = measure(args, chunks, count)
    except replay.UnusableGradients as problem:
        mine = str(problem)
    parts: list = [None] * args.world_size
    torch.distributed.all_gather_object(parts, mine)
    for part in parts:
        if isinstance(part, str):
            raise UsageError(f"{part}. Look at --load, --data-path and the dtype.")
    # Ranks that share a layer have the same numbers.
    layers = {number: sites for part in parts for number, sites in part.items()}
    return {str(number): layers[number] for number in sorted(layers)}


def report(args, command: str, iteration: int | None, count: int, layers: dict[str, dict]) -> dict:
    """The content of the file; ``command`` is what was typed."""
    return {
        "version": sensitivity.VERSION,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "device": torch.cuda.get_device_name(),
        "model": {
            "layers": args.num_layers,
            "hidden_size": args.hidden_size,
            "ffn_hidden_size": args.ffn_hidden_size,
            "heads": args.num_attention_heads,
            "query_groups": args.num_query_groups if args.group_query_attention else args.num_attention_heads,
            "gated": gated(args),
            "normalization": args.normalization,
            "seq_length": args.seq_length,
            "tensor_parallel": args.tensor_model_parallel_size,
            "pipeline_parallel": args.pipeline_model_parallel_size,
            "data_parallel": args.data_parallel_size,
            "sequence_parallel": args.sequence_parallel,
        },
        "dtype": str(args.params_dtype).removeprefix("torch."),
        "checkpoint": iteration,
        "tokens": count * args.micro_batch_size * args.data_parallel_size * args.seq_length,
        "formats": {str(width): str(fmt) for width, fmt in sensitivity.BEST_FORMATS.items()},
        "layers": layers,
    }


# --- The command ----------------------------------------------------------------------------------


def own_flags() -> argparse.Namespace:
    """Take this command's own flags off the command line; the rest is Megatron's.

    Raises:
        UsageError: they cannot work.
    """
    parser = argparse.ArgumentParser(
        prog="python -m agoq_megatron.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other flags are Megatron's: pretrain_gpt_agoq.py --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--calibrate-output", type=Path, metavar="FILE", help="JSON file to write (required)")
    parser.add_argument(
        "--calibrate-batches", type=int, default=4, metavar="N", help="micro-batches a data-parallel rank (4)"
    )
    mine, rest = parser.parse_known_args()
    output = mine.calibrate_output
    if output is None:
        raise UsageError("--calibrate-output: name the JSON file to write.")
    if output.is_dir():
        raise UsageError(f"--calibrate-output {output}: that is a folder; name a file in it.")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--calibrate-output {output}: its folder does not exist; create it.")
    if any(word.partition("=")[0] == "--num-experts" for word in rest):
        raise UsageError(
            "--num-experts: mixtures of experts are not calibrated yet; use --agoq-activations agoq or "
            "a policy file; --agoq-probe-interval measures what each tensor's rounding does."
        )
    if mine.calibrate_batches < 1:
        raise UsageError(f"--calibrate-batches {mine.calibrate_batches}: give a positive number.")
    if "--agoq-dry-run" in rest:
        raise UsageError("--agoq-dry-run: nothing would be measured; leave it out.")
    sys.argv[1:] = [*rest, *SETTLED]
    return mine


def be_one_rank() -> None:
    """Without torchrun: set up as it would set up a single rank."""
    if "MASTER_ADDR" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        ours = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)}
        os.environ.update(ours, MASTER_ADDR="localhost")


def main() -> None:
    """Measure and write the file. Exits with 2 and one paragraph where that cannot work."""
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        cpu.install()
    try:
        compat.check_megatron()
        command = shlex.join(["python", "-m", "agoq_megatron.calibrate", *sys.argv[1:]])
        flags = own_flags()
        be_one_rank()
        args = command_line.parse_arguments(on_cpu, UNUSED)
        if args.multi_latent_attention:
            raise UsageError("--multi-latent-attention: calibrating its tensors is not carried yet.")
        if args.context_parallel_size > 1:
            raise UsageError(
                f"--context-parallel-size {args.context_parallel_size}: errors are measured on whole "
                "sequences; leave it out."
            )
        compare_devices(args, training.refuse)
        if args.mtp_num_layers:
            raise UsageError(
                "--mtp-num-layers: errors in layers of further tokens are not measured; leave it out: those "
                "of the decoder are."
            )
        set_global_variables(args)
    except training.REFUSALS as problem:
        training.refuse(training.paragraph(problem))

    compat.skip_compiling_helpers()
    compat.bind_checkpoint(quantized_checkpoint)
    if args.agoq_loss == "in-place":
        compat.bind_cross_entropy(vocab_parallel_cross_entropy)
    initialize_megatron(allow_no_cuda=on_cpu)
    chunks, iteration = build_model(args)
    if iteration is None:
        print_rank_0(
            "calibrate: WARNING: no checkpoint was loaded, so the weights are random. The errors of a "
            "trained model are others, and what you want: give its checkpoint with --load."
        )
    try:
        layers = gathered(args, chunks, flags.calibrate_batches)
    except UsageError as problem:
        training.refuse(str(problem))
    if args.rank == 0:
        content = report(args, command, iteration, flags.calibrate_batches, layers)
        sensitivity.write_atomically(flags.calibrate_output, json.dumps(content, indent=1) + "\n")
        print("\n".join(sensitivity.table(layers)))
        print(f"calibrate: wrote {flags.calibrate_output}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
