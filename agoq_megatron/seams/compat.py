"""Every foreign symbol that is rebound where a GPU is present too, each with its reason.

(``cpu.py`` holds those that a machine without a GPU needs.) All are names of megatron-core 0.19,
which moves by hundreds of lines between minor versions; hence the version check.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib
import multiprocessing
import queue
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.managers import SyncManager
from types import SimpleNamespace
from typing import Literal

from agoq_megatron.seams import register

MEGATRON_MINIMUM, MEGATRON_LIMIT = (0, 19), (0, 20)
_REMEDY = 'pip install "megatron-core>=0.19,<0.20"'
TESTED = 'pip install "megatron-core==0.19.2"'


class CompatibilityError(RuntimeError):
    """The installed megatron-core cannot be used; the message names the command that helps."""


def check_megatron(part: Literal["all", "core", "layers"] = "all") -> None:
    """Raise :class:`CompatibilityError` unless a supported megatron-core is installed whose internals are
    those that we reach for, or that a part of us does. Megatron must be imported, as at a run's start.
    """
    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise CompatibilityError(f"megatron-core is not installed. Run: {_REMEDY}") from None
    parts = tuple(int(p) for p in installed.split(".")[:2])
    if not MEGATRON_MINIMUM <= parts < MEGATRON_LIMIT:
        raise CompatibilityError(
            f"megatron-core {installed} is installed, and 0.19 is needed: internals differ. Run: {_REMEDY}"
        )
    if found := broken_seams(part):
        raise CompatibilityError(
            f"megatron-core {installed} differs in what this project reaches for, and a run could train "
            f"wrongly: {'; '.join(found)}. Run: {TESTED}"
        )


@functools.cache
def broken_seams(part: str = "all") -> tuple[str, ...]:
    """What of ``register.toml`` is not as it was. Once a process: what is bound here later is ours."""
    left = {"all": (), "core": register.OF_TRAINING, "layers": register.OF_ITS_LOOP}[part]
    return tuple(register.problems(seam for seam in register.all_seams() if not seam.module.startswith(left)))


def silence_missing_accelerators() -> None:
    """Megatron warns a dozen times at import that Transformer Engine and apex are missing. Both are
    optional here; call this before Megatron is imported.
    """
    for name in ("Apex is not installed", "Transformer Engine and Apex are not", "Only transformer-eng"):
        warnings.filterwarnings("ignore", message=name, category=UserWarning)


def skip_compiling_helpers() -> None:
    """``initialize_megatron`` runs ``make`` in the installed package, where the wheel has put no
    Makefile, and exits when that fails. The wheel ships the compiled module: where it imports,
    there is nothing to make.
    """
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        return
    import megatron.core.datasets.utils as utils

    utils.compile_helpers = lambda: None


@functools.cache
def bind_flag_docstrings() -> None:
    """Megatron's flags take their help from the source of its dataclasses, which is read and parsed for every
    parser: two at a run's start, each 0.2 s. Here once a class.
    """
    from megatron.training.argument_utils import ArgumentGroupFactory

    stock, known = ArgumentGroupFactory._get_field_docstrings, {}

    @functools.wraps(stock)
    def docstrings(self, config_class: type) -> dict[str, str]:
        if config_class not in known:
            known[config_class] = stock(self, config_class)
        return dict(known[config_class])

    ArgumentGroupFactory._get_field_docstrings = docstrings


def bind_optimizers(**subclasses: type) -> None:
    """The optimizers' classes have no seam: ``get_megatron_optimizer`` looks their names up.

    Args:
        subclasses: by the name of the class that each takes the place of.
    """
    import megatron.core.optimizer as optimizer

    for name, subclass in subclasses.items():
        if not issubclass(subclass, getattr(optimizer, name)):
            raise TypeError(f"{subclass.__name__} is no subclass of Megatron's {name}")
        setattr(optimizer, name, subclass)


def bind_data_parallel(subclass: type) -> None:
    """The class that wraps a model has no seam either; nor could the stock wrap pass by its own class and
    keep its other duties (streams, buckets, initial broadcast).
    """
    import megatron.training.models.dist_utils as dist_utils

    if not issubclass(subclass, dist_utils.DistributedDataParallel):
        raise TypeError(f"{subclass.__name__} is no subclass of Megatron's DistributedDataParallel")
    dist_utils.DistributedDataParallel = subclass


@contextmanager
def replaced_in_data_parallel(names: dict[str, Callable]) -> Iterator[None]:
    """While DDP is constructed: other classes for its buffer and bucket groups, which it looks up by name.
    The stock buffer would allocate all gradients in 16 or 32 bits.
    """
    import megatron.core.distributed.distributed_data_parallel as ddp

    stock = {name: getattr(ddp, name) for name in names}
    vars(ddp).update(names)
    try:
        yield
    finally:
        vars(ddp).update(stock)


def bind_gradient_statistics(clip: Callable, count_zeros: Callable, reduce_embedding: Callable) -> None:
    """Functions that read ``param.grad`` or ``main_grad`` as a tensor, which 8-bit gradients are not:
    clipping, counting zeros, and the sum of tied embeddings over pipeline stages.

    Args:
        clip, count_zeros, reduce_embedding: take the stock function, return one in its place.
    """
    import megatron.core.optimizer.optimizer as optimizer

    # The package has a function of that name, which "import ... as" would give.
    finalize = importlib.import_module("megatron.core.distributed.finalize_model_grads")

    optimizer.clip_grad_by_total_norm_fp32 = clip(optimizer.clip_grad_by_total_norm_fp32)
    optimizer.count_zeros_fp32 = count_zeros(optimizer.count_zeros_fp32)
    finalize._allreduce_embedding_grad = reduce_embedding(finalize._allreduce_embedding_grad)


def bind_checkpoint(wrap: Callable[[Callable], Callable]) -> None:
    """Replace activation recomputation by ``wrap(stock)``.

    Transformer blocks and layers look ``tensor_parallel.checkpoint`` up when they run; what it
    keeps of a recomputed region's input cannot be told otherwise.
    """
    import megatron.core.tensor_parallel as tensor_parallel

    tensor_parallel.checkpoint = wrap(tensor_parallel.checkpoint)


def bind_gradient_clipping() -> None:
    """Without Transformer Engine and apex Megatron takes the norm of each gradient for itself, waiting
    for the device each time, and clips through a temporary copy: 16 ms a step on a model of 2e9
    parameters, where torch's fused functions take half.
    """
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.utils as utils
    import torch

    def l2_norm(chunk_size, overflow, tensor_lists, per_tensor):
        return torch.nn.utils.get_total_norm(tensor_lists[0], foreach=True).float().view(1), None

    def scale(chunk_size, overflow, tensor_lists, factor):
        sources, targets = tensor_lists
        if sources is targets:
            torch._foreach_mul_(targets, factor)
        else:
            torch._foreach_copy_(targets, torch._foreach_mul(sources, factor))

    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = scale


def bind_weight_gradient_product(add_product: Callable) -> None:
    """Megatron's own linear layers (here: the output layer) add their weight gradients to DDP's buffers
    within the product, but only by an extension of apex. Where that is missing ours takes its place.

    Args:
        add_product: ``(buffer [o, i], grad [tokens, o], x [tokens, i])``, adds in place.
    """
    import megatron.core.tensor_parallel.layers as layers

    if layers._grad_accum_fusion_available:
        return

    def product(x, grad, buffer):
        add_product(buffer, grad, x)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=product, wgrad_gemm_accum_fp16=product
    )
    layers._grad_accum_fusion_available = True


def bind_cross_entropy(loss: Callable) -> None:
    """Replace Megatron's unfused cross entropy: the model's class, which Megatron's builder names, calls
    it by this name.

    Args:
        loss: ``(logits [s, b, v / t], target [s, b], tp_group)`` -> token losses ``[s, b]``.
    """
    import megatron.core.tensor_parallel as tensor_parallel

    tensor_parallel.vocab_parallel_cross_entropy = loss


def bind_multi_token_prediction(spec: Callable) -> None:
    """Replace what Megatron's builder makes layers of multi-token prediction from, ``(config, decoder's spec,
    vp_stage)`` -> the block's: it takes Transformer Engine's or its own, whatever the decoder's are."""
    import megatron.training.models.gpt as gpt

    gpt.mtp_block_spec = spec


@contextmanager
def other_product(layer, product: Callable) -> Iterator[None]:
    """While one of Megatron's linear layers is called: another product. It must run inside the layer's call,
    on which DDP waits for the gather of its weights.
    """
    stock = layer._forward_impl
    layer._forward_impl = product
    try:
        yield
    finally:
        layer._forward_impl = stock


def checkpoint_state(folder: str, args) -> dict | None:
    """What is no tensor in the checkpoint that will be loaded from ``folder``, or None. How a run was left
    must be known before its memory is planned and its model built. Megatron reads it for
    --use-checkpoint-args, but hands on only its own arguments; this is the function by which it finds and
    reads it.
    """
    from megatron.training.checkpointing import _load_base_checkpoint

    return _load_base_checkpoint(folder, args, rank0=True)[0]


def checkpoint_arguments(folder: str, args):
    """The arguments in that checkpoint, or None."""
    state = checkpoint_state(folder, args)
    return None if state is None else state.get("args")


def samples_of(args) -> tuple[int | None, ...] | None:
    """Samples that Megatron builds datasets for with these arguments, of a checkpoint: only its own function
    knows, and takes them from a global. None where they lack something, as those of an older version.
    """
    import megatron.training.training as training

    stock, training.get_args = training.get_args, lambda: args
    try:
        return tuple(training.get_train_valid_test_num_samples())
    except (AssertionError, AttributeError, TypeError):
        return None
    finally:
        training.get_args = stock


def bind_scheduler(subclass: type) -> None:
    """The class of the learning rate's scheduler has no seam: the function that builds it looks it up."""
    import megatron.training.training as training

    if not issubclass(subclass, training.OptimizerParamScheduler):
        raise TypeError(f"{subclass.__name__} is no subclass of Megatron's OptimizerParamScheduler")
    training.OptimizerParamScheduler = subclass


def scheduler_of(args, scheduler_class: type):
    """The scheduler that Megatron will build, over an optimizer without parameters: only its own function
    knows how flags become one. It takes the arguments from a global that does not exist before writers are
    opened, and counts iterations by another one, which it does not need; neither they nor ``args`` change.
    """
    import megatron.training.training as training

    own = {
        "get_args": functools.partial(copy.copy, args),
        "update_train_iters": lambda _: None,
        "OptimizerParamScheduler": scheduler_class,
    }
    stock = {name: getattr(training, name) for name in own}
    vars(training).update(own)
    try:
        return training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[]))
    finally:
        vars(training).update(stock)


def bind_checking_checkpoint(wrap: Callable[[Callable], Callable]) -> None:
    """Replace the check of a loaded checkpoint's arguments by ``wrap(stock)``: no other function that could
    be replaced gets to see them.
    """
    import megatron.training.checkpointing as checkpointing

    checkpointing.check_checkpoint_args = wrap(checkpointing.check_checkpoint_args)


def bind_training_loop(name: str, wrap: Callable[[Callable], Callable]) -> None:
    """Replace a function of Megatron's loop by ``wrap(stock)``: ``pretrain`` offers no callbacks,
    and the losses it computes reach nobody but the log, rounded.

    Args:
        name: a function of ``megatron.training.training``.
    """
    import megatron.training.training as training

    setattr(training, name, wrap(getattr(training, name)))


def bind_checkpoint_files(save: Callable, load: Callable, tracker: Callable) -> None:
    """Saving and loading a checkpoint, around which ``pretrain`` has no callbacks, and the file system
    through which the number of the last checkpoint is written.

    Args:
        save, load, tracker: take what is there, return what takes its place.
    """
    import megatron.core.dist_checkpointing as dist_checkpointing
    import megatron.training.checkpointing as checkpointing

    dist_checkpointing.save = save(dist_checkpointing.save)
    bind_training_loop("load_checkpoint", load)
    checkpointing.maybe_msc = tracker(checkpointing.maybe_msc)


def bind_checkpoint_results(asynchronous: bool) -> None:
    """Megatron's writer hands its results over through a process of its own, a multiprocessing manager: the
    start of it imports the main script again, and it lives on for ever where its rank is killed. A save that
    is not asynchronous happens within the rank, where an ordinary queue does; for others the manager is told
    to end with its rank.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer

    if writer._results_queue is not None:
        return
    if not asynchronous:
        writer._results_queue = queue.Queue()
        return
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=end_with_parent)
    _managers.append(manager)
    writer._results_queue = manager.Queue()


_managers: list[SyncManager] = []  # one that nobody holds is shut down


def end_with_parent() -> None:
    """In a new process: the kernel ends it when the thread that started it does (on Linux; else nothing)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def bind_wandb_opening(wrap: Callable[[Callable], Callable]) -> None:
    """Megatron opens its W&B run without an id, so that none is ever continued, and lets what W&B raises (no
    login, no network) end the last rank alone. ``wrap`` takes its function ``(args) -> None``."""
    import megatron.training.global_vars as global_vars

    global_vars._set_wandb_writer = wrap(global_vars._set_wandb_writer)


def bind_wandb_artifacts(wrap: Callable[[Callable], Callable]) -> None:
    """After a save the last rank makes a W&B artifact of the checkpoint and adds the tracker file, which only
    rank 0 writes: it may not be there yet, or still be that of the save before. Megatron does not wait for
    it, and lets what W&B raises end the last rank alone. ``wrap`` takes its function."""
    import megatron.training.wandb_utils as wandb_utils

    wandb_utils.on_save_checkpoint_success = wrap(wandb_utils.on_save_checkpoint_success)


def bind_wandb(log: Callable[[Callable], Callable], finish: Callable[[Callable], Callable]) -> None:
    """Megatron's W&B writer is the module ``wandb`` itself: it logs by ``wandb.log(values, iteration)``, and
    W&B drops steps that go back, as those of a resumed run may. To be called once the W&B run is open, as
    opening sets ``wandb.log``; ``log`` and ``finish`` take W&B's functions."""
    import wandb

    wandb.log, wandb.finish = log(wandb.log), finish(wandb.finish)
