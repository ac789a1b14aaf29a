"""Megatron's training loop on a machine without a GPU.

``megatron.training`` speaks to ``torch.cuda`` throughout, though on gloo nothing of what it does
needs a GPU. This module answers for the missing device, in four layers:

1. ``torch.cuda``'s queries, streams, events and generator state get answers that are true on a CPU:
   one device, no asynchrony, no separate memory, one generator.
2. A ``TorchFunctionMode`` turns ``device="cuda"`` (and device numbers) into the CPU,
   ``Tensor.cuda()`` into the tensor itself, and lets ``Tensor.type()`` say ``torch.cuda.…``, a
   string that Megatron's optimizers compare.
3. Megatron's flags that only a GPU can serve get other defaults; what the user says still wins.
4. Where the processor has no instructions for BF16, its products are made in FP32 and rounded.

It is imported only where ``torch.cuda.is_available()`` is False, and that answer stays False: code
that asks properly is told the truth. Ascend's ``transfer_to_npu`` serves its accelerators in the
same way.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections import defaultdict
from types import SimpleNamespace

# torch.compile reads it when it decorates, which Megatron does at import. Compiling for the CPU
# would need a C++ compiler and cost minutes for nothing.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 - tabulates torch's functions at import: before ours
import torch.distributed as dist  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

# Says, when Megatron is imported, that there is no CUDA runtime.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
}
"""Megatron's argument names and the defaults that they get on a CPU."""

_mode: TorchFunctionMode | None = None
_products: torch.library.Library | None = None  # what it holds ends with it


class _Stream:
    """A stream of a device that runs everything at once: waiting is over before it starts."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None):
        return event or _Event()


class _Event:
    """An event that has always happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end) -> float:
        return 0.0


_STREAM = _Stream()


def _cpu_device(device):
    """Map a CUDA device, however it is written, to the CPU; leave anything else as it is."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int):
        return torch.device("cpu")
    if isinstance(device, str) and device.startswith("cuda"):
        return torch.device("cpu")
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def _type(x, *args, **kwargs):
    name = torch.Tensor.type(x, *args, **kwargs)
    asked = not args and not kwargs and "cuda" not in name
    return name.replace("torch.", "torch.cuda.", 1) if asked else name


def _to(x, *args, **kwargs):
    if args:
        args = (_cpu_device(args[0]), *args[1:])
    if "device" in kwargs:
        kwargs["device"] = _cpu_device(kwargs["device"])
    return torch.Tensor.to(x, *args, **kwargs)


def _backward(tensors, grad_tensors=None, retain_graph=None, create_graph=False, inputs=None):
    """Within an overridden call the mode is off, and a recomputed region runs its whole backward in
    one: this is ``torch.autograd.backward`` with the mode on again.
    """
    tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    if isinstance(grad_tensors, torch.Tensor):
        grad_tensors = (grad_tensors,)
    with _mode:
        grads = torch.autograd._make_grads(
            tensors, grad_tensors or (None,) * len(tensors), is_grads_batched=False
        )
        torch.autograd.Variable._execution_engine.run_backward(
            tensors,
            tuple(grads),
            create_graph if retain_graph is None else retain_graph,
            create_graph,
            tuple(inputs or ()),
            allow_unreachable=True,
            accumulate_grad=True,
        )


_REDIRECTED = {
    torch.autograd.backward: _backward,
    torch.Tensor.cuda: lambda x, *args, **kwargs: x,
    torch.Tensor.pin_memory: lambda x, *args, **kwargs: x,
    torch.Tensor.record_stream: lambda x, stream: None,
    torch.Tensor.type: _type,
    torch.Tensor.to: _to,
}


class _CpuForCuda(TorchFunctionMode):
    """Redirects what Megatron addresses to a CUDA device. Every torch function passes through here,
    so what concerns few of them is looked up, not asked."""

    def __torch_function__(self, func, types, args=(), kwargs=None, find=_REDIRECTED.get):
        redirected = find(func)
        if redirected is not None:
            return redirected(*args, **(kwargs or {}))
        if not kwargs:
            return func(*args)
        if "device" in kwargs:
            kwargs["device"] = _cpu_device(kwargs["device"])
        kwargs.pop("pin_memory", None)  # of the rows of rotary angles of a context-parallel rank
        return func(*args, **kwargs)


def _answer_torch_cuda() -> None:
    """Layer 1: the names of ``torch.cuda`` that Megatron's training loop calls."""

    def nothing(*args, **kwargs):
        return None

    def zero(*args, **kwargs):
        return 0

    def stream(*args, **kwargs):
        return _STREAM

    def get_rng_state(device="cuda"):
        return torch.get_rng_state()

    def set_rng_state(new_state, device="cuda"):
        torch.set_rng_state(new_state)

    answers = {
        # With PYTORCH_NVML_BASED_CUDA_CHECK=1 torch's own asks device_count, which is 1 here.
        "is_available": lambda: False,
        "device_count": lambda: 1,
        "current_device": zero,
        "set_device": nothing,
        "get_device_name": lambda *a: "CPU",
        "get_device_capability": lambda *a: (8, 0),  # what Megatron wants for --moe-grouped-gemm
        # Megatron asks for the generation, to demand CUDA_DEVICE_MAX_CONNECTIONS before the tenth.
        "get_device_properties": lambda *a: SimpleNamespace(name="CPU", major=10, minor=0),
        "synchronize": nothing,
        "empty_cache": nothing,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda *a, **k: contextlib.nullcontext(),
        "set_stream": nothing,
        "current_stream": stream,
        "default_stream": stream,
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_reserved": zero,
        "reset_peak_memory_stats": nothing,
        "memory_stats": lambda *a, **k: defaultdict(int),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": nothing,  # torch.manual_seed calls it
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = get_rng_state
    torch.cuda.random.set_rng_state = set_rng_state


def _answer_megatron() -> None:
    """What Megatron does below ``torch.cuda``'s public names, and its own check for a GPU."""
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as dispatchers
    import megatron.training.training as training

    def get_state(device="cuda", clone=False, graph_safe=False):
        return torch.get_rng_state()

    def set_state(new_state, device=-1, graph_safe=False):
        torch.set_rng_state(new_state)

    # These two reach for torch.cuda.default_generators, which is empty here.
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # It hands on the sizes of an all-to-all as they are where they are on the CPU already: a tensor, which
    # torch does not take.
    move = dispatchers.maybe_move_tensor_to_cpu

    def move_or_take(tensor, as_numpy=False, record_stream=False):
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor)

    dispatchers.maybe_move_tensor_to_cpu = move_or_take
    # pretrain() has no way to pass the permission on.
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    # The CPU's generator is the only one here, so the tracker's check for a stray use of it, meant
    # for GPUs, fires at every fork.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _keep_loaders_off_the_generator() -> None:
    """A data loader draws its workers' seed from the CPU's generator when iteration starts. On a
    GPU machine dropout draws from another one; here both would share it, and a resumed run, whose
    loaders start after the checkpoint's generator state is restored, would drop out other elements.
    """
    stock = DataLoader.__iter__

    @functools.wraps(stock)
    def start(self):
        state = torch.get_rng_state()
        try:
            return stock(self)
        finally:
            torch.set_rng_state(state)

    DataLoader.__iter__ = start


def _gather_one_by_one() -> None:
    """torch's gloo backend now and then crashes, or corrupts memory, in asynchronous coalesced gathers
    (torch 2.11: a few thousand of them on two ranks are enough), which --overlap-param-gather makes. Gathers
    one by one are sound."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    stock = buffers._coalescing_manager

    @contextlib.contextmanager
    def manager(group=None, device=None, async_ops=False):
        group = group or dist.group.WORLD
        with stock(group, device, async_ops) as works:
            yield works
            recorded = dist.distributed_c10d._world.pg_coalesce_state[group]
            gathers = [entry for entry in recorded if entry.op is dist.all_gather_into_tensor]
            recorded[:] = [entry for entry in recorded if entry not in gathers]
        for gather in gathers:
            works.append(dist.all_gather_into_tensor(gather.dst_tensor, gather.tensor, group, async_ops))

    buffers._coalescing_manager = manager


def _multiply_in_fp32() -> None:
    """Without AVX-512 torch multiplies BF16 matrices in a plain loop, 50 times as slowly as FP32 ones. There
    their products are made of the same numbers in FP32 and rounded once, as instructions for BF16 do it."""
    global _products
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    products = "mm", "bmm", "addmm", "baddbmm"
    names = (*products, "addmm_", "baddbmm_", *(f"{name}.out" for name in products))
    attention = "_scaled_dot_product_flash_attention_for_cpu_backward"
    kernels = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in (*names, attention)}

    def in_fp32(name: str) -> None:
        stock, plain = kernels[name], kernels[name.removesuffix(".out").removesuffix("_")]

        def multiply(keys, *args, **kwargs):
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            if any(x.dtype is not torch.bfloat16 for x in given):
                return stock.call_boxed(keys, *args, **kwargs)
            out = kwargs.pop("out", None)
            wide = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
            result = plain.call_boxed(keys, *wide, **kwargs)
            if name.endswith("_"):
                return args[0].copy_(result)
            return result.bfloat16() if out is None else out.resize_(result.shape).copy_(result)

        _products.impl(name, multiply, "CPU", with_keyset=True)

    def attention_backward(keys, grad, *args, **kwargs):
        stock = kernels[attention]
        if grad.dtype is not torch.bfloat16:
            return stock.call_boxed(keys, grad, *args, **kwargs)
        wide = [x.float() if isinstance(x, torch.Tensor) else x for x in (grad, *args)]
        return tuple(x.bfloat16() for x in stock.call_boxed(keys, *wide, **kwargs))

    _products = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that one is replaced
        for name in names:
            in_fp32(name)
        _products.impl(attention, attention_backward, "CPU", with_keyset=True)


def install(quiet: bool = False) -> None:
    """Make Megatron's loop run on the CPU, in this process, from here on. Says so once (rank 0), if not
    ``quiet``.

    Raises:
        RuntimeError: there is a GPU.
    """
    global _mode
    if _mode is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("agoq_megatron.seams.cpu is for machines without a GPU, and there is one here")
    _answer_torch_cuda()
    _answer_megatron()
    _keep_loaders_off_the_generator()
    _gather_one_by_one()
    _multiply_in_fp32()
    _mode = _CpuForCuda()
    _mode.__enter__()
    if os.environ.get("RANK", "0") == "0" and not quiet:
        print("AGoQ: no GPU found; training on the CPU over gloo.", flush=True)
