"""What each way of keeping a tensor costs the gradient, layer by layer: what is measured, and the file of it.

``python -m agoq_megatron.calibrate`` measures (:mod:`agoq_megatron.planning.replay`) and writes. Later runs
read the file by :func:`load_sensitivities`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from agoq_kernels.formats import BIT_WIDTHS, CODES, GROUP_SIZES, OUTLIERS, SCALE_BITS, Format

from agoq_megatron.model.transformer_config import AGoQTransformerConfig
from agoq_megatron.modules.sites import (
    ATTENTION_SITES,
    FC1_OUTPUT,
    GATE,
    LAYER_INPUT,
    NORM1_INPUT,
    NORM2_INPUT,
    has_gate,
)
from agoq_megatron.planning.replay import OneTensor
from agoq_megatron.policy.fitting import axes_of
from agoq_megatron.policy.sites import SITES, Site

VERSION = 2
"""1 measured other formats, and attention with the exact log-sum-exp."""

ATTENTION_INPUTS = tuple(site for site in ATTENTION_SITES if not site.recomputable)
SOLVED = (NORM1_INPUT, *ATTENTION_INPUTS, NORM2_INPUT, FC1_OUTPUT)
"""What a solver may quantize, without recomputation of whole layers. The attention's output is not among it:
it is computed again from what is kept of Q, K and V, which takes no bytes and the time of an attention; kept
beside rounded queries and keys its statistics would be those of other scores."""

BEST_FORMATS = {
    2: Format(2, "int_asym", 32, 8),
    3: Format(3, "int_asym", 32, 8),
    4: Format(4, "nf4", 64, 8),
    5: Format(5, "cubic", 64, 8),
    6: Format(6, "cubic", 64, 8),
    8: Format(8, "int", 64, 16),
    10: Format(10, "int", 64, 8),
    12: Format(12, "int", 64, 8),
}
"""The format of each width; docs/format-study.md says why. See :func:`best_format`."""

OUTLIER_SITES = (NORM1_INPUT, NORM2_INPUT, LAYER_INPUT)
"""The residual stream, whose 4 bits keep the largest number of each group apart: a few of its channels are
hundreds of times the others."""


def best_format(site: Site, width: int) -> Format:
    """The format of that width for a tensor."""
    best = BEST_FORMATS[width]
    return replace(best, outliers=1) if width == 4 and site in OUTLIER_SITES else best


def _every_format() -> Iterator[Format]:
    for settings in itertools.product(BIT_WIDTHS, CODES, GROUP_SIZES, SCALE_BITS, ["nearest"], OUTLIERS):
        with suppress(ValueError):  # not all of these exist
            yield Format(*settings)


_FORMATS = {str(fmt): fmt for fmt in _every_format()}
"""Every format by its name."""


def format_for(site: Site, width: int, features: int) -> Format | None:
    """The format of that width for a tensor whose last axis has so many features on a rank.

    Where the best format's group does not divide them it gets the largest smaller group that does; None where
    no group does.
    """
    best = best_format(site, width)
    groups = [group for group in GROUP_SIZES if group <= best.group and features % group == 0]
    return replace(best, group=max(groups)) if groups else None


def variants(config: AGoQTransformerConfig) -> list[OneTensor]:
    """Every tensor in every width; gates if the attention has them, and the layers' inputs too if the run
    recomputes whole layers."""
    features = axes_of(config)
    sites = (*SOLVED, GATE) if has_gate(config) else SOLVED
    sites = (*sites, LAYER_INPUT) if config.recompute_granularity == "full" else sites
    formats = ((site, format_for(site, width, features[site])) for site in sites for width in BEST_FORMATS)
    return [OneTensor(site, fmt) for site, fmt in formats if fmt is not None]


def _name(site: Site | str) -> str:
    """Its path below the layer."""
    return site if isinstance(site, str) else site.value


# --- The file -------------------------------------------------------------------------------------


def layer_entry(tried: Sequence[OneTensor], errors: Sequence[tuple[float, float]]) -> dict[str, dict]:
    """A layer's part of the file: ``{site: {width: {"own", "flowing", "bits"}}}``, and "format" where it is
    not the width's. What is not finite, as too few bits of Q and K may be, is left out."""
    sites: dict[str, dict] = {}
    for variant, (own, flowing) in zip(tried, errors, strict=True):
        fmt = variant.format
        site = sites.setdefault(variant.site.value, {})
        if math.isfinite(own) and math.isfinite(flowing):
            entry = {"own": own, "flowing": flowing, "bits": fmt.bits_per_element}
            entry = {name: float(f"{number:.6g}") for name, number in entry.items()}
            site[str(fmt.bits)] = entry if fmt == BEST_FORMATS[fmt.bits] else entry | {"format": str(fmt)}
    return sites


def table(layers: Mapping[str, dict]) -> Iterator[str]:
    """Lines: own and flowing error of each tensor in each width, mean over the layers of a file."""
    yield "Mean over the layers: error of the layer's own gradients / of the one that flows on"
    yield f"{'':<38}" + "".join(f"{f'{width} bits':>19}" for width in BEST_FORMATS)
    for site in next(iter(layers.values())):
        line = f"{site:<38}"
        for width in map(str, BEST_FORMATS):
            found = [sites[site][width] for sites in layers.values() if width in sites[site]]
            means = [statistics.fmean(e[name] for e in found) for name in ("own", "flowing") if found]
            line += f"{' / '.join(f'{mean:.2g}' for mean in means) or '-':>19}"
        yield line


def write_atomically(path: Path, text: str) -> None:
    """Write the file whole, or leave what was there."""
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp lets nobody else read it
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


class Sensitivities:
    """Measured errors; made by :func:`load_sensitivities`.

    Attributes:
        path: the file.
        data: what is in it.
        least: widths by tensor below which a solver must not go, whatever was measured.
        stand_ins: by tensor another one, whose errors are taken for its own where it was not measured.
    """

    def __init__(self, path: Path, data: dict):
        self.path, self.data = path, data
        self.least: dict[Site, int] = {}
        self.stand_ins: dict[Site, Site] = {}

    def require(self, **model: int) -> None:
        """Refuse another model than the measured one: ``require(layers=32, hidden_size=4096)``.

        Raises:
            ValueError: a number differs from that under "model" in the file. Nothing is interpolated.
        """
        for name, value in model.items():
            measured = self.data["model"].get(name)
            if measured != value:
                raise ValueError(
                    f"{self.path}: measured on a model with {name} {measured}, but this one has {value}. "
                    "Measure this model: python -m agoq_megatron.calibrate."
                )

    def widths(self, layer_number: int, site: Site | str) -> tuple[int, ...]:
        """The widths in which the tensor was measured, ascending. One is missing where no group divides the
        tensor, or where the error was not finite.

        Raises:
            ValueError: that tensor was not measured.
        """
        return tuple(sorted(map(int, self._site(layer_number, site))))

    def has(self, layer_number: int, site: Site | str) -> bool:
        """Whether the tensor was measured."""
        return self._measured(layer_number, site) in self.data["layers"].get(str(layer_number), {})

    def relative_layer(self, layer_number: int, layers: int) -> int:
        """The measured layer that stands where layer ``layer_number`` (from 1) of ``layers`` does: the same
        one if the model is as deep, else the nearest by relative depth; the ends are the ends."""
        if layers == 1:
            return 1
        place = (layer_number - 1) * (self.data["model"]["layers"] - 1)
        return 1 + (2 * place + layers - 1) // (2 * (layers - 1))  # to the nearest, in whole numbers

    def cost(self, layer_number: int, site: Site | str, width: int) -> float:
        """Sum of the squared relative errors of both gradients: ``own**2 + flowing**2``.

        Costs add up: the errors of different tensors are independent, so their squares add.

        Args:
            layer_number: from 1.
            site: the tensor, or its path below the layer.

        Raises:
            ValueError: it was not measured.
        """
        entry = self._entry(layer_number, site, width)
        return entry["own"] ** 2 + entry["flowing"] ** 2

    def format(self, layer_number: int, site: Site | str, width: int) -> Format:
        """The format that was measured; ValueError as for :meth:`cost`."""
        entry = self._entry(layer_number, site, width)
        return _FORMATS[entry.get("format", self.data["formats"][str(width)])]

    def _measured(self, layer_number: int, site: Site | str) -> str:
        """Name of the tensor whose errors are taken: its own where it was measured."""
        names = {its.value: other.value for its, other in self.stand_ins.items()}
        name = _name(site)
        return name if name in self.data["layers"].get(str(layer_number), {}) else names.get(name, name)

    def _site(self, layer_number: int, site: Site | str) -> dict:
        layers, name = self.data["layers"], self._measured(layer_number, site)
        if str(layer_number) not in layers:
            raise ValueError(f"{self.path}: it has layers 1 to {len(layers)}, and no layer {layer_number}.")
        if name not in layers[str(layer_number)]:
            known = ", ".join(layers[str(layer_number)])
            raise ValueError(f"{self.path}: {name} of layer {layer_number} was not measured; were {known}.")
        return layers[str(layer_number)][name]

    def _entry(self, layer_number: int, site: Site | str, width: int) -> dict:
        widths = self._site(layer_number, site)
        if str(width) not in widths:
            raise ValueError(
                f"{self.path}: {_name(site)} of layer {layer_number} was not measured in {width} bits; "
                f"it was in {', '.join(widths) or 'none'}."
            )
        return widths[str(width)]


def load_sensitivities(path: Path | str) -> Sensitivities:
    """Read and check what ``python -m agoq_megatron.calibrate`` has written.

    Raises:
        ValueError: it cannot be read, or is not such a file; names the file and what is wrong.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error}).") from error
    problem = _problem(data)
    if problem:
        raise ValueError(f"{path}: {problem}. Write it again: python -m agoq_megatron.calibrate.")
    return Sensitivities(path, data)


def _problem(data) -> str | None:
    """What is wrong with the content of a file, or None."""
    if not isinstance(data, dict) or data.get("version") != VERSION:
        found = data.get("version") if isinstance(data, dict) else None
        return f"no sensitivities of version {VERSION} (its version: {found!r})"
    for key in ("model", "formats", "layers"):
        if not isinstance(data.get(key), dict):
            return f"the mapping {key!r} is missing"
    count = data["model"].get("layers")
    if type(count) is not int or count < 1 or data["layers"].keys() != {str(n + 1) for n in range(count)}:
        return f"its model has {count!r} layers, and measured are {', '.join(data['layers']) or 'none'}"
    for width, name in data["formats"].items():
        if not _is_format(name, width):
            return f"format {name!r} of {width} bits is unknown"
    for number, sites in data["layers"].items():
        if not isinstance(sites, dict) or not sites or not all(isinstance(w, dict) for w in sites.values()):
            return f"layer {number}: it must map tensors to widths and these to errors"
        for site, widths in sites.items():
            if site not in {s.value for s in SITES}:
                return f"layer {number}: tensor {site!r} is unknown"
            for width, entry in widths.items():
                problem = _entry_problem(data["formats"], width, entry)
                if problem:
                    return f"layer {number}, {site}, {width} bits: {problem}"
    return None


def _is_format(name, width: str) -> bool:
    return isinstance(name, str) and name in _FORMATS and str(_FORMATS[name].bits) == width


def _entry_problem(formats: dict[str, str], width: str, entry) -> str | None:
    if width not in formats:
        return "that width has no format"
    numbers = [entry.get(key) for key in ("own", "flowing", "bits")] if isinstance(entry, dict) else [None]
    if not all(type(x) in (int, float) and 0 <= x < math.inf for x in numbers):
        return "own, flowing and bits must be finite numbers that are not negative"
    if not _is_format(entry.get("format", formats[width]), width):
        return f"format {entry['format']!r} is unknown"
    return None
