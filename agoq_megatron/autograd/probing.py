"""What rounding does to gradients, measured while training: one call of a layer's function, run again.

The relative error of a saved tensor says little of what it does: keys that are off by .4% have made gradients
that were noise, where attention's statistics were those of the exact ones. So gradients are compared. A call
remembers its inputs; in backward, where the gradient of its output arrives, the same function runs on both
again: once with every tensor kept as it is and products of factors as they are, once with the tensors rounded
that the policy rounds, and products as the run has them (in FP8, say). How far the second's input and weight
gradients are off is added up here; in detail also with each tensor rounded alone, products as they are.

The call itself stays what it is bit for bit: the others see copies, add to no gradient buffer and draw no key
of stochastic rounding. Where an attention has dropout all of them have the same mask: they draw from where
the call began. Where the run has no tally nothing is compared, and a call pays one ``is None``.

Of a micro-batch only the first sequence is taken, of it the first :data:`TOKENS` tokens. That bounds time and
memory: a layer holds its functions' inputs from forward to backward (10.5 hidden states of those tokens
with LLaMA-3-8B's ratios, 168 MiB in 16 bits), and while one function is compared its saved tensors in full,
its input's gradient twice and its weight's twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from agoq_kernels.dropout import GeneratorState
from torch import Tensor

from agoq_megatron.autograd.function import arguments_of
from agoq_megatron.autograd.packing import Packing
from agoq_megatron.autograd.products import Products
from agoq_megatron.autograd.run import Run
from agoq_megatron.autograd.saving import SavedTensor
from agoq_megatron.policy.policy import Rule
from agoq_megatron.policy.sites import SITES, Site

TOKENS = 2048
"""Of a sequence, at most, that are compared."""
WEIGHTS = ("weight", "weight1", "weight2")
"""Arguments of functions whose gradients are compared, beside the first one's."""
PIECE = 1 << 22
"""Numbers compared at a time: what lives meanwhile, 48 MiB, is two copies in FP32 and one in FP64."""


def functions() -> dict[str, tuple[Site, ...]]:
    """The tensors that each of a layer's functions keeps and may round, by its name."""
    found: dict[str, tuple[Site, ...]] = {}
    for site in SITES:
        if site.function is not None:
            found[site.function] = (*found.get(site.function, ()), site)
    return found


def columns() -> tuple[str, ...]:
    """Of a tally: tensors, each rounded alone, and functions, where they round several or their products'
    factors."""
    return *(site.value for site in SITES), *functions()


class GradientTally:
    """Sums of squares of gradients and of their errors, of the first call of each function in an iteration.

    Args:
        layers: numbers (from 1) of the layers to measure, and whether in detail; others are passed over.
        device: where the sums are kept. They are never read here, so the host never waits.
        key: of the draws of stochastic rounding; another one in every iteration.

    Attributes:
        squares: FP64 ``[layers, len(columns()), 3, 2]``: of the input's and the weight's gradient (and of
            another weight's, where there is one) the squared error, and the square of the exact one. Zero for
            what this rank has not measured.
    """

    def __init__(self, layers: Mapping[int, bool], device: torch.device, key: int = 0):
        self._rows = {number: row for row, number in enumerate(layers)}
        self._detailed = dict(layers)
        self._key = key
        self._seen: set[tuple[int, str]] = set()
        self._entries: dict[int, tuple[Site, Tensor]] = {}
        self._noted: set[int] = set()
        self._functions, self._columns = functions(), columns()
        shape = len(self._rows), len(self._columns), 3, 2
        self.squares = torch.zeros(shape, dtype=torch.float64, device=device)

    def note_entry(self, saved: SavedTensor, x: Tensor) -> None:
        """``x`` ``[s, b, h]`` enters a region that is recomputed from what ``saved`` keeps of it. The pass in
        which gradients flow sees that alone; the exact one is remembered for it."""
        number = saved.layer_number
        if number in self._rows and number not in self._noted:  # later micro-batches are not measured
            self._noted.add(number)
            self._entries[number] = saved.site, x.detach()[:TOKENS, :1].clone()

    def capture(
        self, function: type, spec, needs: tuple[bool, ...], *inputs, after: tuple = (), cut: bool = True
    ) -> Probe | None:
        """Remember a call ``function.forward(ctx, *inputs, spec, True, *after)``, if it is to be measured.

        Args:
            needs: ``ctx.needs_input_grad``.
            inputs: the first ``[s, b, n]``; the function may write into it afterwards.
            after: parameters, and documents that sequences are packed of.
            cut: take the first tokens of ``inputs``, as of the gradient later; else the caller has done it.
        """
        sites = {getattr(spec, f.name).site: f.name for f in _tensors(spec)}
        number = getattr(spec, next(iter(sites.values()))).layer_number
        row = self._rows.get(number)
        if row is None:
            return None
        name = next(name for name, its in self._functions.items() if sites.keys() & set(its))
        rounded = [site for site, field in sites.items() if getattr(spec, field).rule.format is not None]
        entry = None
        if self._entries.get(number, (None,))[0] in self._functions[name]:
            entry = self._entries[number]
        if (number, name) in self._seen or not (rounded or entry):
            return None
        self._seen.add((number, name))
        self._entries.pop(number, None) if entry else None
        parts = spec.group.size() if getattr(spec, "sequence_parallel", False) else 1
        rows = inputs[0].shape[0]
        mine = [_cut_as(x, parts, rows) for x in inputs] if cut else list(inputs)
        mine[0] = mine[0].clone()
        exact = mine[0] if entry is None else _cut(entry[1], TOKENS // parts)
        sums = dict(zip(self._columns, self.squares[row], strict=True))
        return Probe(
            function, spec, needs, mine, exact, rounded, entry and entry[0], name, parts, rows, sums,
            self._detailed[number], self._key + number, GeneratorState.now(mine[0].device),
            tuple(_cut(x, TOKENS) for x in after), cut,
        )  # fmt: skip


@dataclass
class Probe:
    """A call that is to be compared once the gradient of its output is there.

    Attributes:
        function, spec, needs, inputs, after: as given to :meth:`GradientTally.capture`, cut.
        exact: the first input as it was before anything was rounded.
        rounded: tensors that the function rounds.
        entry: the tensor of which its input is what was kept, or None.
        name: the function's.
        parts: ranks that the sequence is cut over.
        rows: tokens of the first input, on this rank.
        sums: ``[2, 2]`` by column, added to.
        detail: each tensor by itself, too.
        key: of stochastic rounding.
        generator: where the call's mask of dropout begins.
        cut: gradients are cut here.
    """

    function: type
    spec: object
    needs: tuple[bool, ...]
    inputs: list
    exact: Tensor | None
    rounded: list[Site]
    entry: Site | None
    name: str
    parts: int
    rows: int
    sums: dict[str, Tensor]
    detail: bool
    key: int
    generator: GeneratorState
    after: tuple = ()
    cut: bool = True

    @torch.no_grad()
    def measure(self, *grads: Tensor | None) -> None:
        """Compare, at the gradients ``[s, b, o]`` of the call's first outputs; others count as zero."""
        if grads[0] is None or not self.inputs:
            return  # nothing to compare with, or backward runs a second time
        if self.cut:
            grads = [_cut_as(grad, self.parts, self.rows) for grad in grads]
        sites = {*self.rounded, *([self.entry] if self.entry else [])}
        own = getattr(self.spec, "products", None)
        own = None if own is None or own.exact else replace(own, into_buffer=False)
        alone = len(sites) == 1 and own is None
        column = sites.copy().pop().value if alone else self.name
        exact = self._gradients(grads, set())
        self._add(column, self._gradients(grads, sites, own), exact)
        if self.detail and not alone:
            for site in sorted(sites, key=SITES.index):
                self._add(site.value, self._gradients(grads, {site}), exact)
        # The autograd node that holds this lives as long as anybody holds the loss.
        self.inputs.clear()
        self.exact = None

    def _gradients(
        self, grads: list[Tensor | None], sites: set[Site], products: Products | None = None
    ) -> list[Tensor | None]:
        """Of input and weights, with these tensors rounded as the policy says and all others exact, and with
        these products, or those of factors as they are."""
        changed = {}
        if hasattr(self.spec, "products"):
            changed["products"] = products or self.spec.products.unrounded()
        if hasattr(self.spec, "context"):
            changed["context"] = None  # the tokens of this rank are compared among themselves
        for its in _tensors(self.spec):
            saved = getattr(self.spec, its.name)
            rule = saved.rule
            # Attention's output that is made again is so whatever it is made of.
            if rule.format is not None and saved.site not in sites:
                rule = Rule(keep=True)
            changed[its.name] = _Copy(saved.site, saved.layer_number, rule, key=self.key)
        first = self.inputs[0] if self.entry in sites else self.exact
        call = _Call(self.needs)
        spec = replace(self.spec, **changed)
        with self.generator.again():
            out = self.function.forward(call, first.clone(), *self.inputs[1:], spec, True, *self.after)
        others = (None,) * (len(out) - len(grads)) if isinstance(out, tuple) else ()
        del out
        copies = (None if grad is None else grad.clone() for grad in grads)
        found = self.function.backward(call, *copies, *others)
        names = arguments_of(self.function)
        return [found[0], *(found[names.index(it)] for it in WEIGHTS if it in names)]

    def _add(self, column: str, held: list[Tensor | None], exact: list[Tensor | None]) -> None:
        for sums, a, b in zip(self.sums[column], held, exact, strict=False):  # one weight or two
            if a is not None:
                add_squares(sums, a, b)


@dataclass(frozen=True)
class _Copy(SavedTensor):
    """A tensor of a call that is run again: it draws with a key of its own. So is its run, where nobody
    listens."""

    key: int = field(default=0, kw_only=True)

    def next_key(self) -> int:
        return self.key


class _Call:
    """Takes the place of autograd's context, where a function is run outside of it."""

    def __init__(self, needs: tuple[bool, ...]):
        self.needs_input_grad = needs
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass


def add_squares(sums: Tensor, held: Tensor, exact: Tensor) -> None:
    """Add the squared L2 norms of ``held - exact`` and of ``exact`` to ``sums`` ``[2]`` FP64."""
    wide = torch.promote_types(exact.dtype, torch.float32)
    held, exact = held.reshape(-1), exact.reshape(-1)
    for start in range(0, exact.numel(), PIECE):
        part = slice(start, start + PIECE)
        reference = exact[part].to(wide)
        error = held[part].to(wide, copy=True).sub_(reference)
        found = [torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in (error, reference)]
        sums += torch.stack(found)


def _tensors(spec) -> list:
    """The fields of a function's spec that say how a tensor is kept."""
    return [its for its in fields(spec) if isinstance(getattr(spec, its.name), SavedTensor)]


def _cut_as(x, parts: int, rows: int):
    """:func:`_cut` of something that has ``rows`` tokens on this rank, of a sequence cut over ``parts``
    ranks, or the whole sequence, of which the same tokens are taken."""
    if not isinstance(x, Tensor) or x.dim() < 3:
        return x
    pieces = parts if x.shape[0] == parts * rows else 1
    return _cut(x, TOKENS // parts * pieces, pieces)


def _cut(x, tokens: int, parts: int = 1):
    """The first tokens of the first sequence of an activation ``[s, b, ...]``, of each of ``parts`` pieces of
    its sequence; of documents those that begin there; a parameter or anything else as it is."""
    if isinstance(x, Packing):
        return x.first(tokens)
    if not isinstance(x, Tensor) or x.dim() < 3:
        return x
    x = x.detach()
    pieces = x.view(parts, x.shape[0] // parts, *x.shape[1:])
    return pieces[:, : tokens // parts, :1].flatten(0, 1)


def capture(
    run: Run, function: type, spec, needs: tuple[bool, ...], *inputs, after: tuple = (), cut: bool = True
) -> Probe | None:
    """Report a call in which gradients will flow; see :meth:`GradientTally.capture`."""
    if run.tally is None:
        return None
    return run.tally.capture(function, spec, needs, *inputs, after=after, cut=cut)


def note_entry(saved: SavedTensor, x: Tensor) -> None:
    """Report what enters a recomputed region; see :meth:`GradientTally.note_entry`."""
    if saved.run.tally is not None:
        saved.run.tally.note_entry(saved, x)
