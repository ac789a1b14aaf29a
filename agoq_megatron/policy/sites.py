"""The register of tensors that a layer may keep for its backward pass.

Modules contribute to it (``agoq_megatron.modules.sites``). Policy, plan, meter and calibration read it
and know no tensor by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields


def in_every_layer(config, number: int) -> bool:
    return True


def once(config) -> float:
    return 1.0


def in_one_part(config) -> int:
    return 1


@dataclass(frozen=True)
class Site:
    """A tensor that a transformer layer may keep.

    Attributes:
        value: its path below ``decoder.layers.N.``, N being the layer's index in the whole model (from 0,
            whatever the pipeline stage). Policies match on these paths.
        axis: of a transformer config: length of the last axis on a tensor-parallel rank.
        hidden: a hidden state: tensor-parallel ranks hold it in common, or, with sequence parallelism, each a
            part of the sequence. Others are split along the last axis.
        free: it is made of other saved tensors in a pass over memory that is made anyway.
        recomputable: it can be made of other saved tensors of the layer.
        function: name of the function whose backward pass reads it rounded, or None.
        again_with: Megatron's selective recomputation that makes it again ("core_attn", "mlp"), or None.
        entry: it is the layer's input, which is kept where the whole layer runs again, and only there.
        present: of a transformer config and a layer's number (from 1): whether that layer has it.
        copies: of a transformer config: how many of it a rank has for each token of its part of the sequence.
        newer: it was contributed after digests of plans were first compared. They name it only where a layer
            has it, so that models without keep theirs.
        parts: of a transformer config: over so many more ranks its last axis is divided where it is kept, of
            as many times the tokens.
    """

    value: str
    axis: Callable[[object], int] = field(compare=False, repr=False)
    hidden: bool = field(default=False, compare=False, repr=False)
    free: bool = field(default=False, compare=False, repr=False)
    recomputable: bool = field(default=False, compare=False, repr=False)
    function: str | None = field(default=None, compare=False, repr=False)
    again_with: str | None = field(default=None, compare=False, repr=False)
    entry: bool = field(default=False, compare=False, repr=False)
    present: Callable[[object, int], bool] = field(default=in_every_layer, compare=False, repr=False)
    copies: Callable[[object], float] = field(default=once, compare=False, repr=False)
    newer: bool = field(default=False, compare=False, repr=False)
    parts: Callable[[object], int] = field(default=in_one_part, compare=False, repr=False)

    def path(self, layer_number: int) -> str:
        """Full path in layer ``layer_number`` (from 1, as Megatron counts)."""
        return f"decoder.layers.{layer_number - 1}.{self.value}"

    @property
    def pattern(self) -> str:
        """A glob that in a policy file stands for it in all layers, and for nothing else. (The path of FC2's
        input ends as that of the layer's.)"""
        return f"*[!c][0-9].{self.value}" if self.entry else f"*.{self.value}"

    def __reduce__(self):
        if self in SITES:
            return site_named, (self.value,)
        return Site, tuple(getattr(self, it.name) for it in fields(self))


@dataclass(frozen=True)
class Companion:
    """What is kept beside sites, never rounded.

    Attributes:
        name: path below the layer.
        row: of a transformer config, the layer's rules by site and the sites that it keeps: how it is kept,
            numbers and bytes a token on a rank; None where it is not.
    """

    name: str
    row: Callable[[object, Callable, Iterable[Site]], tuple[str, float, float] | None]


SITES: list[Site] = []
"""In the order of the forward pass."""
COMPANIONS: list[Companion] = []


def contribute(sites: Iterable[Site], companions: Iterable[Companion] = ()) -> None:
    """Add to the register. Adding the same again changes nothing."""
    SITES.extend(site for site in sites if site not in SITES)
    known = {it.name for it in COMPANIONS}
    COMPANIONS.extend(it for it in companions if it.name not in known)


def site_named(value: str) -> Site:
    """The site at this path below a layer.

    Raises:
        KeyError: there is none.
    """
    for site in SITES:
        if site.value == value:
            return site
    raise KeyError(value)
