"""An activation's output times a number a token (a router's probability, a gate), before FC2.

FC2 is linear: weighting its input weights its output, which then need not be kept for the number's gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from agoq_kernels.weights import weigh_backward_
from torch import Tensor

from agoq_megatron.autograd.activation import ActivationOutput
from agoq_megatron.autograd.kept import Kept


def weighted(y: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """``y`` ``[..., f]`` times ``weights`` ``[...]``, in the type of ``y``; the product is rounded once.

    ``out`` may be ``y`` itself, where nobody else holds that.
    """
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device) if out is None else out
    return torch.mul(y, weights.unsqueeze(-1), out=out)


class WeightedGradients(NamedTuple):
    """Of :func:`weighted_backward`.

    Attributes:
        x: gradient of the activation's input.
        weights: gradient of the weights.
        output: the weighted output, made again.
    """

    x: Tensor
    weights: Tensor
    output: Tensor


def weighted_backward(
    grad: Tensor, weights: Tensor, made: ActivationOutput, kept: Kept | None
) -> WeightedGradients:
    """From the gradient of the weighted output ``[..., f]``.

    Args:
        made: of the activation, with its input.
        kept: the activation's output, where it is kept by itself.
    """
    scaled = weighted(grad, weights)
    grad_x = made.gradient(scaled, output_into_grad=kept is None)
    if kept is None:  # nobody else holds it
        output = scaled
    else:
        output = kept.rebuild(grad.dtype).clone(memory_format=torch.contiguous_format)
    grad_weights = weigh_backward_(grad, output, weights)
    return WeightedGradients(grad_x, grad_weights.to(weights.dtype), output)
