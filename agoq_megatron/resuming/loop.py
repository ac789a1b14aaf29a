"""The checks of checkpoints at the places where Megatron's loop saves and loads."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from agoq_megatron.resuming.checksums import clear, rank_and_world, write_durably, write_manifest
from agoq_megatron.resuming.resume import TRACKER, CheckpointError, candidates, choose, say
from agoq_megatron.seams.agreement import everyones

VISIBLE_SECONDS = 40
"""How long a rank looks for the tracker file that rank 0 sees: NFS may show a file 30 seconds late."""
_LOOK_SECONDS = 0.05


def local(path) -> bool:
    """Whether a path is in a file system; object storage is left to Megatron."""
    return path is not None and "://" not in str(path)


def guarded_save(stock, checksums: bool):
    """Around ``dist_checkpointing.save``: it starts from an empty folder and ends with checksums.

    Args:
        stock: Megatron's function, called by every rank; with ``async_sharded_save`` it returns a request,
            whose last steps are run by every rank when the files are there.
        checksums: write them.
    """

    @functools.wraps(stock)
    def save(state, checkpoint_dir, *args, **kwargs):
        folder = Path(str(checkpoint_dir))
        if not local(checkpoint_dir):
            return stock(state, checkpoint_dir, *args, **kwargs)
        try:
            if rank_and_world()[0] == 0:
                clear(folder)
            if rank_and_world()[1] > 1:
                dist.barrier()
            request = stock(state, checkpoint_dir, *args, **kwargs)
            if request is None and checksums:
                write_manifest(folder)
        except (OSError, RuntimeError, CheckpointException) as problem:
            if _of_a_peer(problem):
                raise
            failed = CheckpointError(_not_saved(folder, problem))
            if os.environ.get("LOCAL_RANK", "0") != "0":  # may be this rank's alone; the first says its own
                print(f"AGoQ: {failed}", file=sys.stderr, flush=True)
            raise failed from problem
        if request is not None and checksums:
            request.finalize_fns.append(functools.partial(write_manifest, folder))
        return request

    return save


def _of_a_peer(problem: BaseException) -> bool:
    """Whether a save failed as another rank was gone, not for what is to be written."""
    if isinstance(problem, OSError | CheckpointException):
        return isinstance(problem, ConnectionError)
    return "Worker failure" not in str(problem)


def _not_saved(folder: Path, problem: BaseException) -> str:
    text = " ".join(str(problem).split())
    text = text if len(text) < 300 else "..." + text[-300:]  # the innermost reason comes last
    try:
        room = f"; its disk has {shutil.disk_usage(folder).free / 2**20:,.0f} MB left"
    except OSError:
        room = ""
    return (
        f"--save: {folder} could not be saved{room} ({text}). The checkpoints before it are as they were; "
        "make room and start the same command again."
    )


class DurableTracker:
    """Stands for Megatron's file-system module where checkpoints are saved: the tracker file, which Megatron
    empties before it writes the number, is replaced at once.

    Args:
        stock: what it stands for.
    """

    def __init__(self, stock):
        self._stock = stock

    def __getattr__(self, name):
        return getattr(self._stock, name)

    def open(self, path, mode="r", *args, **kwargs):
        if mode == "w" and local(path) and Path(str(path)).name == TRACKER:
            return _ReplacedAtOnce(Path(str(path)))
        return self._stock.open(path, mode, *args, **kwargs)


class _ReplacedAtOnce:
    """A file to write whose text takes the old one's place when it is closed without an error."""

    def __init__(self, path: Path):
        self._path, self._text = path, []

    def write(self, text: str) -> int:
        self._text.append(text)
        return len(text)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            write_durably(self._path, "".join(self._text))


def guarded_load(stock, args, verify: bool):
    """Around ``load_checkpoint``: it loads the newest whole checkpoint.

    Args:
        stock: Megatron's function, called by every rank.
        args: Megatron's arguments.
        verify: compare files with their checksums first.

    Raises:
        CheckpointError: there are checkpoints, and none can be loaded; or Megatron gave up by leaving with
            status 0, which would tell a scheduler that all is done.
    """

    @functools.wraps(stock)
    def load_checkpoint(*positional, **kwargs):
        given = args.ckpt_step, args.non_persistent_ckpt_type
        folder = getattr(args, kwargs.get("load_arg", "load"))
        pretrained = args.pretrained_checkpoint
        if pretrained is not None and (folder is None or not tracked(folder)):
            folder = pretrained  # as Megatron decides it
        if local(folder):
            _skip_bad_non_persistent(args, verify)
            name = choose(Path(folder), args.ckpt_step, verify)
            if name is not None and name != "release":
                args.ckpt_step = int(name.removeprefix("iter_"))
        try:
            return stock(*positional, **kwargs)
        except SystemExit as left:
            if left.code in (None, 0):
                raise CheckpointError(
                    f"--load {folder}: Megatron could not load it; what is wrong stands above."
                ) from left
            raise
        finally:
            args.ckpt_step, args.non_persistent_ckpt_type = given

    return load_checkpoint


def tracked(folder) -> bool:
    """Whether a folder in a file system names a last checkpoint. Every rank must call it: all get the same
    answer, for Megatron looks on each rank by itself, and some would load what others do not find.

    Raises:
        CheckpointError: a rank does not see the file that rank 0 sees, or sees one that rank 0 does not.
    """
    if not local(folder):
        return False
    file = Path(folder, TRACKER)
    first = [file.is_file()]
    rank, world = rank_and_world()
    if world > 1:
        dist.broadcast_object_list(first, src=0)
    end = time.monotonic() + VISIBLE_SECONDS
    while file.is_file() != first[0] and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
    others = [i for i, seen in enumerate(everyones(file.is_file())) if seen != first[0]]
    if others:
        raise CheckpointError(
            f"{file}: rank 0 {'sees' if first[0] else 'does not see'} it, and rank "
            f"{', '.join(map(str, others[:8]))} {'does not' if first[0] else 'does'}. Checkpoints must lie "
            "in a folder that all nodes share."
        )
    return first[0]


def _read_once(path: Path) -> str:
    """A file's text as rank 0 reads it; "" where it cannot. Every rank must call it."""
    text = [""]
    if rank_and_world()[0] == 0:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = [path.read_text()]
    if rank_and_world()[1] > 1:
        dist.broadcast_object_list(text, src=0)
    return text[0]


def _skip_bad_non_persistent(args, verify: bool) -> None:
    """A damaged checkpoint of ``--non-persistent-ckpt-type global`` is left aside for this load."""
    if args.non_persistent_ckpt_type != "global":
        return
    folder = args.non_persistent_global_ckpt_dir or (args.load and str(Path(args.load, "non_persistent")))
    if not tracked(folder):
        return
    try:
        step = int(_read_once(Path(folder, TRACKER)))
        choose(Path(folder), step, verify)
    except (ValueError, CheckpointError):
        say(f"WARNING: no use is made of {folder}, as said above; going on from --load.")
        args.non_persistent_ckpt_type = None


def guarded_arguments(read, folder, args):
    """The arguments in the checkpoint that will be loaded from ``folder``, or None where there is none yet.

    Files are looked for, not read through, as in :func:`guarded_load_args`.

    Args:
        read: Megatron's way to them, ``(folder, args)``.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    given, found = args.ckpt_step, None
    if local(folder):
        name = choose(Path(folder), given, verify=False)
        if name is None:
            return None
        if name != "release":
            args.ckpt_step = int(name.removeprefix("iter_"))
    try:
        found = read(folder, args)
    except (SystemExit, Exception, CheckpointException) as problem:
        text = " ".join(str(problem).split())[:300]
        raise CheckpointError(
            f"--load {folder}: the flags in its newest checkpoint cannot be read ({text or 'damaged'}). Name "
            "an older one with --ckpt-step, or move the damaged folder away."
        ) from problem
    finally:
        args.ckpt_step = given
    return found


def peeked_state(read, args, to_go_on: bool = True) -> dict | None:
    """What is no tensor in the checkpoint that the run will probably load, or None; without a word.
    Nothing but an early refusal may depend on it: another one is loaded where this one is damaged.

    Args:
        read: Megatron's way to it, ``(folder, args)``.
        to_go_on: None, too, where the run takes weights alone (--finetune, or no iteration is named).
    """
    folder, given = args.load, args.ckpt_step
    if folder is None or (to_go_on and args.finetune):
        return None
    if local(folder):
        name = next(iter(candidates(Path(folder), given).names), "release")
        if (to_go_on and name == "release") or any(Path(folder, name).glob("mp_rank_*")):
            return None  # no iteration, or Megatron's older format: one file, with all tensors
        if name != "release":
            args.ckpt_step = int(name.removeprefix("iter_"))
    try:
        return read(folder, args)
    except (SystemExit, Exception, CheckpointException):
        return None
    finally:
        args.ckpt_step = given


OF_THE_MODEL_TOO = """
    layernorm_epsilon layernorm_zero_centered_gamma use_rope_scaling rope_scaling_factor no_rope_freq
    quick_geglu glu_linear_offset activation_func_clamp_value
    rotary_seq_len_interpolation_factor use_mup mup_base_hidden_size mup_embedding_mult mup_output_mult
    mup_base_head_dim mup_attn_scale_power qk_layernorm qk_l2_norm multi_latent_attention q_lora_rank
    kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type
    rotary_scaling_factor mscale mscale_all_dim yarn_original_max_position_embeddings
    yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
    window_size window_attn_skip_freq softmax_type
    attention_output_gate experimental_attention_variant
    moe_router_num_groups moe_router_group_topk moe_router_dtype moe_router_load_balancing_type
    moe_shared_expert_gate moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy
    apply_residual_connection_post_layernorm
""".split()
"""What --use-checkpoint-args leaves out in Megatron 0.19, though the weights mean nothing without it. (The
last two lines are refused here, then by their names: Megatron would load the rest and say nothing.)"""


def guarded_load_args(stock, args, load_arg: str = "load") -> None:
    """``load_args_from_checkpoint`` from the checkpoint that will be loaded, before the ranks know each
    other; and what that leaves out.

    Files are looked for, not read through: every rank would read all of them.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    folder, given = getattr(args, load_arg), args.ckpt_step
    if local(folder):
        name = choose(Path(folder), args.ckpt_step, verify=False)
        if name is not None and name != "release":
            args.ckpt_step = int(name.removeprefix("iter_"))
    try:
        found = stock(args, load_arg=load_arg)  # with the checkpoint's own, where there are any
        for name in OF_THE_MODEL_TOO if isinstance(found, tuple) else ():
            if getattr(found[1], name, None) is not None:
                setattr(args, name, getattr(found[1], name))
    except (SystemExit, Exception, CheckpointException) as problem:
        text = " ".join(str(problem).split())[:300]
        raise CheckpointError(
            f"--use-checkpoint-args: the flags in the newest checkpoint of {folder} cannot be read ({text}). "
            "Give them on the command line instead, or name an older checkpoint with --ckpt-step."
        ) from problem
    finally:
        args.ckpt_step = given
