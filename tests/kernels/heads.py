"""Queries and keys with norms: random tensors, both implementations, and the plain formula in FP64."""

from __future__ import annotations

import torch
from agoq_kernels import fused, head_norm
from agoq_kernels import norm as norms
from agoq_kernels.head_norm import HeadNorm, KeptHeads, unnormed_parts
from agoq_kernels.rotary import rotary_tables
from agoq_kernels.triton import launchers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Torch:
    """What runs on a CPU."""

    split = staticmethod(head_norm.split_normed_qkv)
    from_kept = staticmethod(head_norm.normed_from_kept)

    @staticmethod
    def merge(*args, first_group=0, out):
        return head_norm.merge_normed_qkv(*args, first_group=first_group, out=out)[1]


class Triton:
    """What runs on a GPU, or in the interpreter."""

    @staticmethod
    def split(qkv, groups, head_dim, tables, *rest):
        to = on_device
        parts, packed = launchers.split_normed_qkv(to(qkv), to(tables), groups, head_dim, *to(rest))
        return _cpu(parts), _cpu(packed)

    @staticmethod
    def from_kept(*args):
        return launchers.normed_from_kept(*on_device(args)).cpu()

    @staticmethod
    def merge(*args, first_group=0, out):
        there = out.to(DEVICE)
        grads = launchers.merge_normed_qkv(*on_device(args), first_group, there)
        out.copy_(there)
        return _cpu(grads)


def map_tensors(x, function):
    if isinstance(x, torch.Tensor):
        return function(x)
    if isinstance(x, KeptHeads):
        shift, segments = (map_tensors(t, function) for t in (x.shift, x.segments))
        return KeptHeads(map_tensors(x.kept, function), x.fmt, shift, segments)
    return tuple(map_tensors(t, function) for t in x) if isinstance(x, tuple) else x


def on_device(x):
    return map_tensors(x, lambda t: t.to(DEVICE))


def _cpu(x):
    return map_tensors(x, torch.Tensor.cpu)


class Case:
    """Random tensors of a layer: ``r`` queries a group, ``rot`` of ``d`` features rotated and scaled."""

    def __init__(self, rng, kind, s=5, b=2, groups=2, r=3, d=64, rot=64, interleaved=False,
                 dtype=torch.float32, eps=1e-6, factor=1.0):  # fmt: skip
        def randn(*shape):
            return torch.randn(*shape, generator=rng)

        self.s, self.b, self.groups, self.r, self.d = s, b, groups, r, d
        self.norm, self.interleaved, self.dtype = HeadNorm(kind, eps), interleaved, dtype
        self.factor = factor
        self.angles = 9 * randn(s, 1, 1, rot // 2) if rot else None
        self.tables = None
        if rot:
            pair = torch.stack if interleaved else torch.cat
            self.tables = rotary_tables(pair((self.angles, self.angles), -1).reshape(s, 1, 1, rot), factor)
            if dtype == torch.float64:
                self.tables = tuple(t.double() for t in self.tables)
        self.qkv = randn(s, b, groups * (r + 2) * d).to(dtype)
        centre = 0 if norms.is_zero_centred(kind) else 1
        weights = [centre + randn(d).to(dtype) / 2 if kind != "L2Norm" else None for _ in range(2)]
        biases = [randn(d).to(dtype) if norms.is_layer_norm(kind) else None for _ in range(2)]
        self.parameters = weights[0], biases[0], weights[1], biases[1]
        self.grads = [randn(s, b, n, d).to(dtype) for n in (groups * r, groups, groups)]

    @property
    def layout(self):
        return self.groups, self.d, self.tables, self.interleaved

    def common(self):
        return fused.common_vectors(self.qkv, self.groups, self.d, None, self.interleaved)

    def split(self, implementation, fmt=None, common=None):
        formats = (fmt,) * 3
        return implementation.split(
            self.qkv, *self.layout, self.norm, self.parameters, formats, (1, 2 << 40, 3), common
        )

    def kept(self, packed, fmt, common=None):
        """What backward finds of queries and keys."""
        if fmt is None:
            packed = [fused.kept_as_is(part) for part in unnormed_parts(self.qkv, self.groups, self.d)]
        shifts = [None, None]
        if common is not None:
            n = self.groups * self.r
            shifts = common[:, :n].flatten(1), common[:, n : n + self.groups].flatten(1)
        return [KeptHeads(packed[i], fmt, shifts[i]) for i in range(2)]

    def merge(self, implementation, kept, first=0, last=None):
        """Of some groups, into their place in poisoned memory."""
        groups = slice(first, last)
        queries = slice(first * self.r, None if last is None else last * self.r)
        grads = [g[:, :, queries if i == 0 else groups] for i, g in enumerate(self.grads)]
        whole = torch.full((self.s, self.b, self.groups, (self.r + 2) * self.d), torch.nan, dtype=self.dtype)
        out = whole[:, :, groups].flatten(2)
        sums = implementation.merge(
            *grads,
            self.tables,
            self.interleaved,
            self.norm,
            self.parameters,
            *kept,
            first_group=first,
            out=out,
        )
        assert all((p is None) == (g is None) for p, g in zip(self.parameters, sums, strict=True))
        return out, [g for g in sums if g is not None]

    def in_order(self, vectors):
        """Vectors ``[b, n + 2g, d]`` of all heads of Q, K and V in the order of the projection."""
        n, g = self.groups * self.r, self.groups
        parts = vectors.split([n, g, g], 1)
        return torch.cat([p.reshape(self.b, g, -1) for p in parts], -1).flatten(1)

    # --- The plain formula

    def heads(self, x, weight, bias):
        """One of Q and K ``[s, b, heads, d]``: normalized, then turned as complex numbers."""
        eps = self.norm.eps
        if norms.is_layer_norm(self.norm.kind):
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        else:
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        if norms.is_zero_centred(self.norm.kind):
            weight = 1 + weight
        x = x if weight is None else x * weight
        x = x if bias is None else x + bias
        if self.angles is None:
            return x
        rot, half = 2 * self.angles.shape[-1], self.angles.shape[-1]
        turned, rest = x[..., :rot], x[..., rot:]
        a, b = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else turned.split(half, -1)
        phase = torch.complex(self.angles.cos().to(x.dtype), self.angles.sin().to(x.dtype)) * self.factor
        turned = torch.complex(a, b) * phase
        pair = (turned.real, turned.imag)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat((turned, rest), -1)

    def exact(self, x=None):
        """Q, K, V, and the gradients of the projection ``x`` and of the parameters, in FP64."""
        x = (self.qkv if x is None else x).double().requires_grad_()
        parameters = [None if p is None else p.double().requires_grad_() for p in self.parameters]
        grouped = x.view(self.s, self.b, self.groups, self.r + 2, self.d)
        q, k, v = (
            grouped[..., : self.r, :].flatten(2, 3),
            grouped[..., self.r, :],
            grouped[..., self.r + 1, :],
        )
        parts = self.heads(q, *parameters[:2]), self.heads(k, *parameters[2:]), v
        inputs = [x, *(p for p in parameters if p is not None)]
        grads = torch.autograd.grad(parts, inputs, [g.double() for g in self.grads])
        return [part.detach() for part in parts], grads

    def joined(self, q, k):
        """A projection with these Q and K ``[s, b, heads * d]``, and the V that it had."""
        s, b, groups = self.s, self.b, self.groups
        v = unnormed_parts(self.qkv, groups, self.d)[2]
        return torch.cat([p.double().view(s, b, groups, -1) for p in (q, k, v)], -1).flatten(2)
