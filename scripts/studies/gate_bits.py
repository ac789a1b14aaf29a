#!/usr/bin/env python3
"""What rounding the gates of an attention's output does to gradients, by format and by how gates are spread.

    python scripts/studies/gate_bits.py [--tokens 256] [--seed 3]

One attention with its output projection, on random numbers in FP32 on a CPU: relative errors of the gradients
of the projection that makes Q, K, V and gates (its output) and of the weight behind, with the gates alone
rounded; and, to compare, with Q, K and V as the default policy keeps them. The table: docs/format-study.md.
"""

from __future__ import annotations

import argparse
import math

import torch
from agoq_kernels.formats import Format

from agoq_megatron.autograd.attention_backends import LocalAttention
from agoq_megatron.autograd.attention_linear import AttentionLinear, AttentionLinearSpec
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.modules.sites import ATTENTION_SITES, GATE, QKV_SITES
from agoq_megatron.policy.policy import Rule, load_policy

HEADS, GROUPS, DIM, HIDDEN = 8, 2, 64, 64
FORMATS = {
    "nf4": Format(4, "nf4", 64, 8),
    "nf4, largest apart": Format(4, "nf4", 64, 8, outliers=1),
    "cubic5": Format(5, "cubic", 64, 8),
    "cubic6": Format(6, "cubic", 64, 8),
    "int8": Format(8, "int", 64, 8),
}


def spreads(rng: torch.Generator, tokens: int) -> dict[str, torch.Tensor]:
    """Gates ``[tokens, 1, heads * d]`` by what they are like."""
    z = torch.randn(tokens, 1, HEADS * DIM, generator=rng)
    outlier = z.clone()
    outlier[..., ::64] *= 15
    shift = 5 * torch.randn(HEADS * DIM, generator=rng)
    return {"N(0, 1)": z, "N(-3, 2)": 2 * z - 3, "one channel of 64, times 15": outlier, "means": z + shift}


def spec_of(rules: dict) -> AttentionLinearSpec:
    """An attention that keeps what has no rule as it is, and runs again in backward."""
    how = {s: SavedTensor(s, 1, rules.get(s, Rule(keep=True)), run=Run()) for s in (*QKV_SITES, GATE)}
    output = SavedTensor(ATTENTION_SITES[-1], 1, Rule(), run=Run())
    return AttentionLinearSpec(
        *(how[s] for s in QKV_SITES), output, groups=GROUPS, head_dim=DIM, gate=how[GATE], recompute=False,
        backend=LocalAttention(1 / math.sqrt(DIM)), interleaved=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    rng = torch.Generator().manual_seed(args.seed)
    heads_a_group = HEADS // GROUPS
    others = torch.randn(args.tokens, 1, GROUPS, heads_a_group + 2, DIM, generator=rng)
    weight = (torch.randn(HIDDEN, HEADS * DIM, generator=rng) / 14).requires_grad_()
    grad = torch.randn(args.tokens, 1, HIDDEN, generator=rng)
    agoq = {site: load_policy("agoq").rule(site, 1) for site in QKV_SITES}
    for name, gates in spreads(rng, args.tokens).items():
        in_groups = gates.view(args.tokens, 1, GROUPS, heads_a_group, DIM)
        parts = others[..., :-2, :], in_groups, others[..., -2:, :]
        qkv = torch.cat(parts, 3).flatten(2).requires_grad_()

        def gradients(rules: dict, qkv=qkv):
            y = AttentionLinear.call(qkv=qkv, angles=None, weight=weight, spec=spec_of(rules), keeps=True)
            return torch.autograd.grad(y, (qkv, weight), grad)

        exact = gradients({})
        cases = {"Q, K, V by agoq": agoq} | {label: {GATE: Rule(fmt)} for label, fmt in FORMATS.items()}
        for label, rules in cases.items():
            errors = [(a - b).norm() / b.norm() for a, b in zip(gradients(rules), exact, strict=True)]
            print(f"{name:<28} {label:<20} " + " ".join(f"{error:.4f}" for error in errors))


if __name__ == "__main__":
    main()
