"""Norms of queries and keys: the split of QKV and its inverse for models that normalize each head of both.

Megatron normalizes the d features of each query and key head, with one weight for all heads of either
(``--qk-layernorm``: RMSNorm or LayerNorm; ``--qk-l2-norm``: RMSNorm without a weight), and rotates after
that (``SelfAttention.get_query_key_value_tensors``). Here norm and rotation are one step, in FP32 and rounded
once at its end.

What is kept of Q and K is the projection's own: the norm's backward needs its input, and both follow from it.
Their common vectors (``common_vectors`` without tables) are therefore those before the norm, and they come
back before it, those of the keys too: no constant may be taken off the input of a norm. So the keys of the
forward pass, whole, and their log-sum-exp go with those that :func:`normed_from_kept` gives. Where the
attention is run again in backward anyway, ``centre`` takes off these what they share after norm and rotation.

As in fused.py the composition in torch is what runs on a CPU, and Triton takes its place on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from agoq_kernels import norm as norms
from agoq_kernels import reference
from agoq_kernels.formats import Format
from agoq_kernels.fused import Kept, _format, _pack, _triton, format_name
from agoq_kernels.operator import operator
from agoq_kernels.ops import shift_fits
from agoq_kernels.rotary import join_groups, rotate, rotate_backward
from agoq_kernels.rotary import split_qkv as split
from agoq_kernels.segments import by_token
from torch import Tensor

KINDS = (*norms.KINDS, "L2Norm")

Tables = tuple[Tensor, Tensor] | None
Parameters = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class HeadNorm:
    """The norm of each head of queries and keys.

    Attributes:
        kind: one of ``norm.KINDS``, or ``"L2Norm"``: Megatron's name of an RMSNorm without a weight.
        eps: added to the mean square.
    """

    kind: str
    eps: float

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"a norm of queries and keys is one of {', '.join(KINDS)}; not {self.kind!r}")

    def check(self, weight: Tensor | None, bias: Tensor | None, head_dim: int) -> None:
        """Refuse parameters that are not this norm's: weight ``[d]`` (L2Norm has none), bias ``[d]`` of
        LayerNorm only."""
        may_have_bias = norms.is_layer_norm(self.kind)
        if (weight is None) != (self.kind == "L2Norm") or (bias is not None and not may_have_bias):
            raise ValueError(
                f"{self.kind} of heads with {'no' if weight is None else 'a'} weight and "
                f"{'no' if bias is None else 'a'} bias"
            )
        for name, x in (("weight", weight), ("bias", bias)):
            if x is not None and tuple(x.shape) != (head_dim,):
                raise ValueError(
                    f"the {name} of a head's norm is [{head_dim}], one for all heads; not {tuple(x.shape)}"
                )


@dataclass(frozen=True)
class KeptHeads:
    """Queries or keys as they were kept: before their norm.

    Attributes:
        kept: codes, scale and zero of ``[s, b, heads * d]``, or, without a format, that itself and two empty
            tensors (``fused.kept_as_is``).
        fmt: what they are in.
        shift: FP32 ``[b, heads * d]`` that was taken off what was quantized; not read without a format.
        segments: which row of the shift is a token's, int32 ``[s, b]``; without, its sequence's.
    """

    kept: Kept
    fmt: Format | None
    shift: Tensor | None = None
    segments: Tensor | None = None

    @property
    def width(self) -> int:
        """``heads * d``."""
        n = self.kept[0].shape[-1]
        return n if self.fmt is None else n * 8 // self.fmt.bits

    def check(self, head_dim: int) -> None:
        """Refuse what is not whole heads of ``[s, b, n]``."""
        shape = tuple(self.kept[0].shape)
        if len(shape) != 3 or self.width % head_dim:
            raise ValueError(f"what was kept, {shape}, is no [s, b, heads * {head_dim}]")
        fits = self.shift is None or shift_fits(self.shift, self.kept[0], self.width, self.segments)
        if self.fmt and not fits:
            raise ValueError(f"shift is {tuple(self.shift.shape)}; it takes {(shape[1], self.width)}")


def _unnormed(codes: Tensor, scale: Tensor, zero: Tensor, shift: Tensor | None, fmt: str, head_dim: int,
              wide: torch.dtype, segments: Tensor | None) -> Tensor:  # fmt: skip
    """What was kept, in FP32 (or FP64) ``[s, b, heads, d]``."""
    its_format = _format(fmt)
    if its_format is None:
        x = codes.to(wide)
    else:
        x = reference.dequantize(codes, scale, zero, its_format, wide)
        if shift is not None:
            x = x + by_token(shift, segments)
    return x.unflatten(-1, (-1, head_dim))


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, tables: Tables, interleaved: bool,
            kind: str, eps: float) -> Tensor:  # fmt: skip
    """The norm and the rotation of ``x`` ``[s, b, heads, d]``, in FP32 (or FP64), contiguous."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return rotate(norms.norm(wide, weight, bias, eps, kind), tables, interleaved)


def _unpair(tables: Tables) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if tables is None else tables


def _pair(cos: Tensor | None, sin: Tensor | None) -> Tables:
    return None if cos is None else (cos, sin)


# --- Forward --------------------------------------------------------------------------------------


def unnormed_parts(
    qkv: Tensor, groups: int, head_dim: int, gated: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``[s, b, heads * d]`` as the projection made them, contiguous: what to keep of
    those that are not quantized."""
    return tuple(part.flatten(2) for part in split(qkv, groups, head_dim, None, False, gated))


def split_normed_qkv(
    qkv: Tensor, groups: int, head_dim: int, tables: Tables, interleaved: bool, norm: HeadNorm,
    parameters: Parameters, formats: tuple[Format | None, ...], keys: tuple[int, ...],
    common: Tensor | None = None, segments: Tensor | None = None, gated: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Kept, Kept, Kept]]:  # fmt: skip
    """:func:`fused.split_qkv` with query and key normalized before they are rotated.

    Args:
        qkv: ``[s, b, groups * (r + 2) * head_dim]``.
        tables: FP32 cosine and sine ``[s, 1, 1, rot]``, or None for no rotation.
        parameters: weight and bias ``[d]`` of the queries, then of the keys; None for those it has not.
        formats, keys: of query, key and value, packed as ``[s, b, heads * head_dim]`` before norm and
            rotation. None packs nothing; what is kept as it is comes from :func:`unnormed_parts`.
        common: what ``common_vectors`` found without tables: it is taken off what is packed.
        segments: which of its rows is a token's, int32 ``[s, b]``; without, its sequence's.
        gated: there are r gates between queries and key, which are passed over.

    Returns:
        query ``[s, b, groups * r, d]`` and key ``[s, b, groups, d]``, normalized and rotated, and value; and
        the three packed.
    """
    for weight, bias in (parameters[:2], parameters[2:]):
        norm.check(weight, bias, head_dim)
    out = split_normed_qkv_op(
        qkv, *_unpair(tables), *parameters, common, groups, head_dim, interleaved, norm.kind, norm.eps,
        ",".join(format_name(fmt) for fmt in formats), list(keys), segments, gated,
    )  # fmt: skip
    return tuple(out[:3]), (tuple(out[3:6]), tuple(out[6:9]), tuple(out[9:12]))


@operator("split_normed_qkv")
def split_normed_qkv_op(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, weight_q: Tensor | None, bias_q: Tensor | None,
    weight_k: Tensor | None, bias_k: Tensor | None, common: Tensor | None, groups: int, head_dim: int,
    interleaved: bool, kind: str, eps: float, formats: str, keys: list[int], segments: Tensor | None,
    gated: bool,
) -> list[Tensor]:  # fmt: skip
    parts = split(qkv, groups, head_dim, None, interleaved, gated)
    heads = [part.shape[2] for part in parts]
    shifts = [None] * 3 if common is None else by_token(common, segments).split(heads, dim=-2)
    rest = _pair(cos, sin), interleaved, kind, eps
    out = [
        _normed(part, weight, bias, *rest).to(qkv.dtype)
        for part, weight, bias in ((parts[0], weight_q, bias_q), (parts[1], weight_k, bias_k))
    ]
    out.append(parts[2].clone() if parts[2].data_ptr() == qkv.data_ptr() else parts[2])
    for part, shift, name, key in zip(parts, shifts, formats.split(","), keys, strict=True):
        part = part if shift is None else part.to(shift.dtype) - shift
        out += _pack(part.flatten(2), _format(name), key)
    return out


@split_normed_qkv_op.register_kernel("cuda")
def _(qkv, cos, sin, weight_q, bias_q, weight_k, bias_k, common, groups, head_dim, interleaved, kind, eps,
      formats, keys, segments, gated):  # fmt: skip
    formats = tuple(_format(name) for name in formats.split(","))
    parts, packed = _triton().split_normed_qkv(
        qkv, _pair(cos, sin), groups, head_dim, interleaved, HeadNorm(kind, eps),
        (weight_q, bias_q, weight_k, bias_k), formats, tuple(keys), common, segments, gated,
    )  # fmt: skip
    return [*parts, *packed[0], *packed[1], *packed[2]]


# --- From what was kept ---------------------------------------------------------------------------


def normed_from_kept(
    heads: KeptHeads, head_dim: int, tables: Tables, interleaved: bool, norm: HeadNorm, weight: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype, centre: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Queries or keys ``[s, b, heads, d]``, normalized and rotated, in ``dtype``, from what was kept.

    ``centre``: FP32 ``[b, heads * d]``, or of segments as the shift, taken off before the result is rounded.
    Of keys any vector may be: it changes neither the softmax nor any gradient, and the mean of the tokens, a
    large one, costs precision.
    """
    norm.check(weight, bias, head_dim), heads.check(head_dim)
    if centre is not None and not shift_fits(centre, heads.kept[0], heads.width, heads.segments):
        expected = heads.kept[0].shape[1] if heads.segments is None else "segments", heads.width
        raise ValueError(f"centre is {tuple(centre.shape)}; it takes {expected}")
    return normed_from_kept_op(
        *heads.kept, heads.shift, centre, *_unpair(tables), weight, bias, format_name(heads.fmt), head_dim,
        interleaved, norm.kind, norm.eps, dtype, heads.segments,
    )  # fmt: skip


@operator("normed_from_kept")
def normed_from_kept_op(
    x: Tensor, scale: Tensor, zero: Tensor, shift: Tensor | None, centre: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, weight: Tensor | None, bias: Tensor | None, fmt: str, head_dim: int,
    interleaved: bool, kind: str, eps: float, dtype: torch.dtype, segments: Tensor | None,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(dtype, torch.float32)
    x = _unnormed(x, scale, zero, shift, fmt, head_dim, wide, segments)
    y = _normed(x, weight, bias, _pair(cos, sin), interleaved, kind, eps)
    if centre is not None:
        y = y - by_token(centre, segments).unflatten(-1, y.shape[2:])
    return y.to(dtype)


@normed_from_kept_op.register_kernel("cuda")
def _(x, scale, zero, shift, centre, cos, sin, weight, bias, fmt, head_dim, interleaved, kind, eps, dtype,
      segments):  # fmt: skip
    return _triton().normed_from_kept(
        KeptHeads((x, scale, zero), _format(fmt), shift, segments), head_dim, _pair(cos, sin), interleaved,
        HeadNorm(kind, eps), weight, bias, dtype, centre,
    )  # fmt: skip


# --- Backward -------------------------------------------------------------------------------------


def merge_normed_qkv(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, tables: Tables, interleaved: bool, norm: HeadNorm,
    parameters: Parameters, query: KeptHeads, key: KeptHeads, first_group: int = 0, out: Tensor | None = None,
) -> tuple[Tensor, Parameters]:  # fmt: skip
    """:func:`fused.merge_qkv` through the norms: gradients of the projection, and of the norms' parameters.

    Args:
        grad_q, grad_k, grad_v: ``[s, b, heads, d]``, of all groups of heads or of neighbouring ones.
        parameters: as :func:`split_normed_qkv` takes them.
        query, key: what was kept of all heads; the norms are taken at these values.
        first_group: the group of heads that the gradients begin with.
        out: takes the result: a contiguous tensor, or some groups of a larger one's; see ``fused.merge_qkv``.

    Returns:
        The gradient ``[s, b, groups * (r + 2) * d]`` of these groups of the projection; and those of the
        parameters, FP32 (FP64) ``[d]``: sums over tokens and these heads, None for those that there are not.
    """
    s, b, groups, head_dim = grad_k.shape
    for weight, bias in (parameters[:2], parameters[2:]):
        norm.check(weight, bias, head_dim)
    for kept, grad, name in ((query, grad_q, "query"), (key, grad_k, "key")):
        kept.check(head_dim)
        heads, first = kept.width // head_dim, first_group * (grad.shape[2] // groups)
        if tuple(kept.kept[0].shape[:2]) != (s, b) or not 0 <= first <= heads - grad.shape[2]:
            raise ValueError(
                f"gradients {tuple(grad.shape)} of the {name}, from group {first_group} on, are not some of "
                f"what was kept: {tuple(kept.kept[0].shape)}, {heads} heads"
            )
    if out is None:
        out = grad_k.new_empty(s, b, (grad_q.shape[2] + 2 * groups) * head_dim)
    grads = merge_normed_qkv_op(
        grad_q, grad_k, grad_v, *_unpair(tables), *parameters, *query.kept, query.shift, *key.kept, key.shift,
        format_name(query.fmt), format_name(key.fmt), first_group, interleaved, norm.kind, norm.eps, out,
        query.segments,
    )  # fmt: skip
    return out, tuple(None if p is None else g for p, g in zip(parameters, grads, strict=True))


@operator("merge_normed_qkv", mutates_args=("out",))
def merge_normed_qkv_op(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor | None, sin: Tensor | None,
    weight_q: Tensor | None, bias_q: Tensor | None, weight_k: Tensor | None, bias_k: Tensor | None,
    q: Tensor, scale_q: Tensor, zero_q: Tensor, shift_q: Tensor | None,
    k: Tensor, scale_k: Tensor, zero_k: Tensor, shift_k: Tensor | None,
    fmt_q: str, fmt_k: str, first_group: int, interleaved: bool, kind: str, eps: float, out: Tensor,
    segments: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    groups, head_dim = grad_k.shape[2:]
    wide, grads, merged = torch.promote_types(grad_k.dtype, torch.float32), [], []
    for grad, weight, bias, kept, fmt in (
        (grad_q, weight_q, bias_q, (q, scale_q, zero_q, shift_q), fmt_q),
        (grad_k, weight_k, bias_k, (k, scale_k, zero_k, shift_k), fmt_k),
    ):
        first = first_group * (grad.shape[2] // groups)
        x = _unnormed(*kept, fmt, head_dim, wide, segments)[:, :, first : first + grad.shape[2]]
        grad = rotate_backward(grad.to(wide), _pair(cos, sin), interleaved)
        parameters = [None if p is None else p.to(wide) for p in (weight, bias)]
        grad, *of_parameters = norms.norm_backward(grad, x, *parameters, eps, kind)
        merged.append(grad)
        grads += [out.new_empty(0) if g is None else g for g in of_parameters]
    join_groups(*merged, grad_v, out)
    return grads


@merge_normed_qkv_op.register_kernel("cuda")
def _(grad_q, grad_k, grad_v, cos, sin, weight_q, bias_q, weight_k, bias_k, q, scale_q, zero_q, shift_q,
      k, scale_k, zero_k, shift_k, fmt_q, fmt_k, first_group, interleaved, kind, eps, out,
      segments):  # fmt: skip
    grads = _triton().merge_normed_qkv(
        grad_q, grad_k, grad_v, _pair(cos, sin), interleaved, HeadNorm(kind, eps),
        (weight_q, bias_q, weight_k, bias_k),
        KeptHeads((q, scale_q, zero_q), _format(fmt_q), shift_q, segments),
        KeptHeads((k, scale_k, zero_k), _format(fmt_k), shift_k, segments), first_group, out,
    )  # fmt: skip
    return [out.new_empty(0) if g is None else g for g in grads]
