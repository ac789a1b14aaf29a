"""A policy some of whose tensors have been given more bits than it says, or are recomputed, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from agoq_kernels.formats import Format

from agoq_megatron.policy.policy import KEEP_BITS, Rule
from agoq_megatron.policy.sites import SITES, Site

WIDER = {
    4: Format(4, "nf4", 64, 8),
    5: Format(5, "cubic", 64, 8),
    6: Format(6, "cubic", 64, 8),
    8: Format(8, "int", 64, 16),
    12: Format(12, "int", 64, 8),
}
"""What takes the place of a narrower format; docs/format-study.md has their errors."""
WIDTHS = (*WIDER, KEEP_BITS)
RECOMPUTED = 0
"""In the place of a width: of the attention's output, which is then made again from Q, K and V."""


def next_width(bits: int) -> int:
    """The next of :data:`WIDTHS` above ``bits`` (2 to 12); 16 is: not quantized."""
    return next(width for width in WIDTHS if width > bits)


def widened(rule: Rule, bits: int) -> Rule:
    """``rule`` with at least ``bits``, one of :data:`WIDTHS`. A tensor that is kept, or recomputed, stays so,
    but that :data:`RECOMPUTED` recomputes a kept one too.

    Rounding stays, groups get no larger, so that they still divide the tensor, and where the largest number
    of each is kept apart it still is.
    """
    if bits == RECOMPUTED:
        return Rule()
    if rule.format is None or rule.format.bits >= bits:
        return rule
    if bits == KEEP_BITS:
        return Rule(keep=True)
    fmt, old = WIDER[bits], rule.format
    scale_bits = 8 if old.outliers else fmt.scale_bits
    group = min(fmt.group, old.group)
    new = replace(fmt, group=group, scale_bits=scale_bits, rounding=old.rounding, outliers=old.outliers)
    return Rule(new)


class RaisedPolicy:
    """Any policy, with more bits for single tensors of single layers.

    Args:
        base: of any kind: its ``name`` and ``rule`` are used.
        widths: bits at least, one of :data:`WIDTHS`, or :data:`RECOMPUTED`, by the tensor's path
            (``Site.path``). Paths of layers that the model does not have say nothing.
    """

    def __init__(self, base, widths: Mapping[str, int]):
        self.base, self.widths = base, dict(widths)
        self.name = base.name
        # Of the solver's policy: what it chose and why, before anything was raised.
        self.summary, self.record = getattr(base, "summary", ()), getattr(base, "record", None)

    def rule(self, site: Site, layer_number: int) -> Rule:
        """See :meth:`ActivationPolicy.rule`."""
        rule = self.base.rule(site, layer_number)
        bits = self.widths.get(site.path(layer_number))
        return rule if bits is None else widened(rule, bits)

    def raised(self, layers: Iterable[int]) -> dict[tuple[Site, int], list[int]]:
        """{(tensor, its bits now, or RECOMPUTED): layers}, of ``layers`` (from 1) those that are not kept as
        the base says."""
        found: dict[tuple[Site, int], list[int]] = {}
        for site in SITES:
            for number in layers:
                rule = self.rule(site, number)
                if rule != self.base.rule(site, number):
                    bits = KEEP_BITS if rule.keep else rule.format.bits if rule.format else RECOMPUTED
                    found.setdefault((site, bits), []).append(number)
        return found

    def __deepcopy__(self, memo):
        # Megatron copies transformer configs; the policy in them is immutable.
        return self
