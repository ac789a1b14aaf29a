"""How Megatron lays out the ranks of process groups, where it needs a package for it."""

from __future__ import annotations

from types import SimpleNamespace

from agoq_megatron.seams.compat import TESTED, CompatibilityError


def lay_out_hierarchical_groups() -> None:
    """Megatron lays the ranks of --hierarchical-context-parallel-sizes out by one call of einops, which the
    wheel does not bring; where it is missing, numpy does what that call asks for.
    """
    from megatron.core import parallel_state

    if parallel_state.HAVE_EINOPS:
        return

    def rearrange(ranks, pattern: str, *, l: int, s: int, u: int):  # noqa: E741  (einops' names)
        if pattern != "(l s u) -> (l u) s":
            raise CompatibilityError(f"megatron-core lays groups out by {pattern!r}. Run: {TESTED}")
        return ranks.reshape(l, s, u).transpose(0, 2, 1).reshape(l * u, s)

    parallel_state.einops, parallel_state.HAVE_EINOPS = SimpleNamespace(rearrange=rearrange), True
