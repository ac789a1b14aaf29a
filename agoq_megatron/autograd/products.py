"""The products of a linear layer: a strategy that the fused functions are given."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agoq_megatron.autograd.collectives import gather_sequence
from agoq_megatron.autograd.kept import Kept

READ_MAIN_GRAD = (
    "the gradient of this weight was added to its main_grad. Its grad only says that there is one and has no "
    "memory: read main_grad, or train with --no-gradient-accumulation-fusion"
)


@dataclass(frozen=True)
class Products:
    """Products in the type of their factors, by torch.

    Attributes:
        into_buffer: add the weight's gradient to the gradient buffer that Megatron's DDP gave the weight, if
            it did, within the product (Megatron's ``--no-gradient-accumulation-fusion`` is the opposite).
        reports: False for all uses of a weight but one, where a forward pass has several.
    """

    into_buffer: bool = False
    reports: bool = True

    exact = True
    """Factors are read as they are. Where they are not, nobody makes one in the place of another tensor, and
    what is cast once for two products comes as :meth:`cast_gradient` and :meth:`factor` give it."""

    def unrounded(self) -> Products:
        """The same with factors as they are, whose gradients go to no buffer: to compare with."""
        return Products()

    def gather(self, x: Tensor, group) -> tuple[Tensor, object]:
        """``x`` ``[s / t, b, i]`` of every rank of ``group``, for :meth:`output` once the handle has
        waited."""
        return gather_sequence(x, group)

    def cast_gradient(self, grad: Tensor, of_weight: bool) -> Tensor:
        """``grad`` ``[s, b, o]`` for :meth:`input_gradient` and, with ``of_weight``,
        :meth:`weight_gradient`."""
        return grad

    def factor(self, kept: Kept, dtype: torch.dtype) -> Tensor:
        """What was kept of a layer's input ``[s, b, i]``, for :meth:`weight_gradient`."""
        return kept.rebuild(dtype)

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [s, b, i] @ weight[o, i]^T (+ bias[o])`` -> ``[s, b, o]``."""
        return F.linear(x, weight, bias)

    def added_output(self, x: Tensor, weight: Tensor, total: Tensor, out: Tensor) -> None:
        """``out [s, b, o] = total [s, b, o] + x [s, b, i] @ weight[o, i]^T``, rounded once."""
        rows, factor = total.reshape(-1, total.shape[-1]), x.view(-1, x.shape[-1])
        torch.addmm(rows, factor, weight.t(), out=out.view_as(rows))

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """``grad [s, b, o] @ weight[o, i]`` -> ``[s, b, i]``."""
        s, b, out_features = grad.shape
        # One 2-D product: with a leading dimension of 1, matmul would not fold them.
        return grad.reshape(s * b, out_features).matmul(weight).view(s, b, -1)

    def weight_gradient(self, weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
        """``grad [s, b, o]^T @ x [s, b, i]``, the gradient of ``weight [o, i]``.

        Returns:
            What the autograd function gives back for the weight: the gradient, or, once it has been added, a
            tensor of its shape without memory. DDP waits for a gradient to be there, and drops this one. It
            must not meet another in autograd, which would add the two up: None unless ``reports``.
        """
        if not self.has_buffer(weight):
            return self._of_weight(grad, x)
        self._add_of_weight(weight.main_grad, grad, x)
        weight.grad_added_to_main_grad = True  # DDP resets it before each step
        if not self.reports:
            return None
        return gradient_without_memory(weight.shape, weight.dtype, weight.device).detach()

    def _of_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).t().matmul(x.reshape(-1, x.shape[-1]))

    def _add_of_weight(self, buffer: Tensor, grad: Tensor, x: Tensor) -> None:
        add_product(buffer, grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]))

    def has_buffer(self, weight: Tensor) -> bool:
        """Whether the weight's gradient is added to a buffer."""
        return self.into_buffer and getattr(weight, "main_grad", None) is not None


def bias_gradient(grad: Tensor) -> Tensor:
    """Sum of ``grad [s, b, o]`` over tokens -> ``[o]``."""
    return grad.reshape(-1, grad.shape[-1]).sum(0)


def add_product(buffer: Tensor, grad: Tensor, x: Tensor) -> None:
    """``buffer [o, i] += grad [tokens, o]^T @ x [tokens, i]`` in place.

    With 16-bit factors and an FP32 buffer this is one product that reads and writes the buffer (a GPU has
    it), instead of a product in 16 bits, rounded, and an addition: fewer bytes, and one rounding.
    """
    if buffer.dtype == x.dtype:
        buffer.addmm_(grad.t(), x)
    elif buffer.dtype == torch.float32 and x.device.type == "cuda":
        torch.addmm(buffer, grad.t(), x, out_dtype=buffer.dtype, out=buffer)
    else:
        buffer.add_(grad.t().matmul(x))


@functools.cache
def gradient_without_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stands for a gradient that nobody will read. Made once, as memory is taken for a moment.

    Whoever reads it on a CPU gets an error; without, torch would read address 0 and the process would end. (A
    GPU reports such a read by itself, and autograd's ``record_stream`` there looks at the storage.)
    """
    stand_in = torch.empty(shape, dtype=dtype, device=device)
    storage = stand_in.untyped_storage()
    storage.resize_(0)
    if device.type == "cpu":
        torch._C._set_storage_data_ptr_access_error_msg(storage._cdata, READ_MAIN_GRAD)
    return stand_in
