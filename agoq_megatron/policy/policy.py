"""Which tensor is kept in which format: Megatron's quantization matchers, read for activations.

A policy is a YAML file in the layout of ``megatron.core.quantization``: named ``configs`` and an
ordered list of ``matchers`` from site paths (see ``sites.py``) to configs. The built-in policies are
such files too, in ``presets/``: copy one to write your own.

A config holds ``bits``: 2, 3, 4, 5, 6 or 8 to quantize (then ``code``, ``group``, ``scale_bits``,
``rounding`` as in ``agoq_kernels.formats``), 16 to keep the tensor in the compute dtype, 0 to keep
nothing and recompute it from another saved tensor.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml
from agoq_kernels.formats import Format
from megatron.core.quantization.quant_config import MatchContext, RecipeConfig

from agoq_megatron.policy.document import DuplicateKey, read_yaml
from agoq_megatron.policy.sites import SITES, Site

PRESETS = Path(__file__).parent / "presets"
BUILT_IN = tuple(sorted(p.stem for p in PRESETS.glob("*.yaml")))
SOLVED = "auto"
COMPUTED = ("stage", SOLVED)
"""Names of policies that follow from the flags: ``planning/policies.py`` registers them."""

KEEP_BITS = 16
_FORMAT_KEYS = {f.name for f in fields(Format)}


class PolicyError(ValueError):
    """A policy that cannot be used; the message names the flag, the file and the remedy."""


@dataclass(frozen=True)
class Rule:
    """What happens to one saved tensor.

    Attributes:
        format: packed format, or None.
        keep: keep it unchanged, in the compute dtype.

    Neither means: keep nothing, recompute it in the backward pass.
    """

    format: Format | None = None
    keep: bool = False

    @property
    def recompute(self) -> bool:
        return self.format is None and not self.keep

    def __str__(self) -> str:
        return str(self.format) if self.format else ("kept" if self.keep else "recomputed")


class ActivationPolicy:
    """Answers, for a site and a layer, how the tensor is kept."""

    def __init__(
        self,
        name: str,
        recipe: RecipeConfig,
        rules: dict[str, Rule],
        labels: dict[str, str],
        patterns: dict[str, str],
    ):
        """Args:
        name: value of the flag, for errors.
        recipe: Megatron's reader of the file.
        rules: by config.
        labels: of the configs, with their lines.
        patterns: of the matchers that are enabled, by their labels.
        """
        self.name = name
        self._recipe = recipe
        self._rules = rules
        self._labels = labels
        self._patterns = patterns

    def check_patterns(self, layers: int) -> None:
        """Of a model with so many layers.

        Raises:
            PolicyError: a pattern matches no saved tensor, which is a misspelt one.
        """
        paths = [site.path(number) for number in range(1, layers + 1) for site in SITES]
        for matcher, pattern in self._patterns.items():
            if not fnmatch.filter(paths, pattern):
                raise PolicyError(
                    f"--agoq-activations {self.name}: matcher {matcher}: pattern {pattern!r} matches no "
                    f"saved tensor of this model's {layers} layers. They are named like {paths[1]}, and "
                    f"below the layer {', '.join(site.value for site in SITES)}."
                )

    @functools.cache  # noqa: B019 - one policy lives as long as the process
    def rule(self, site: Site, layer_number: int) -> Rule:
        """Rule of ``site`` in layer ``layer_number`` (from 1).

        Raises:
            PolicyError: no matcher takes the site, or the rule is not possible there.
        """
        path = site.path(layer_number)
        key = self._recipe.match_to_config_key(MatchContext(path, layer_number))
        if key is None:
            raise PolicyError(
                f"--agoq-activations {self.name}: no matcher takes {path}. Add a last matcher with "
                'pattern "*" so that every saved tensor has a config.'
            )
        rule = self._rules[key]
        if rule.recompute and not site.recomputable:
            raise PolicyError(
                f"{self._given(key, path)}. That tensor cannot be recomputed from another saved one, as bits "
                "0 would have it: give it 2, 3, 4, 5, 6 or 8 bits, or 16 to keep it."
            )
        if rule.format and site.free:
            raise PolicyError(
                f"{self._given(key, path)}, which would be quantized. That tensor is rebuilt from its "
                "producer's saved input at no cost in memory: give it bits 0, or 16 to keep it."
            )
        return rule

    def _given(self, key: str, path: str) -> str:
        """Start of an error: which matcher gives ``path`` the config ``key``, with the lines of both."""
        matcher = next(label for label, glob in self._patterns.items() if fnmatch.fnmatch(path, glob))
        return f"--agoq-activations {self.name}: matcher {matcher} gives config {self._labels[key]} to {path}"

    def __deepcopy__(self, memo):
        # Megatron copies transformer configs; the policy in them is immutable.
        return self


_registered: dict[str, ActivationPolicy] = {}


def register(name: str, policy) -> None:
    """Let :func:`load_policy` find a computed policy."""
    _registered[name] = policy


def load_policy(spec: str, rounding: str = "policy") -> ActivationPolicy:
    """Read a built-in policy by name, or a policy file.

    Args:
        spec: value of ``--agoq-activations``.
        rounding: value of ``--agoq-rounding``; anything but "policy" overrides every config.

    Raises:
        PolicyError: unknown name, unreadable file, or a config out of range.
    """
    if spec in COMPUTED:
        return _registered[spec]
    path = PRESETS / f"{spec}.yaml" if spec in BUILT_IN else Path(spec)
    if not path.is_file():
        known = ", ".join((*BUILT_IN, *COMPUTED))
        raise PolicyError(
            f"--agoq-activations {spec}: neither a built-in policy ({known}) nor an "
            "existing file. Name one of these or give the path of a YAML policy file."
        )
    where = f"--agoq-activations {spec}"
    try:
        data, lines = read_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, DuplicateKey, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise PolicyError(f"{where}: not a readable YAML file ({problem}).") from error

    def label(section: str, key: object) -> str:
        return f"{key!r} (line {lines.get((section, str(key)), '?')})"

    _check_layout(where, data, lines)
    configs = {key: label("configs", key) for key in data["configs"]}
    rules = {
        key: _rule(f"{where}: config {configs[key]}", value, rounding)
        for key, value in data["configs"].items()
    }
    for name, matcher in data["matchers"].items():
        _check_matcher(f"{where}: matcher {label('matchers', name)}", matcher, rules)
    # Megatron announces every match at INFO; the plan says the same in one table.
    logging.getLogger("megatron.core.quantization.quant_config").setLevel(logging.WARNING)
    enabled = {
        label("matchers", name): matcher["pattern"]
        for name, matcher in data["matchers"].items()
        if matcher["enabled"]
    }
    return ActivationPolicy(spec, RecipeConfig.from_config_dict(data), rules, configs, enabled)


def _check_layout(where: str, data, lines: dict[tuple[str, ...], int]) -> None:
    sections = ("configs", "matchers")
    if not isinstance(data, dict) or not all(isinstance(data.get(k), dict) for k in sections):
        raise PolicyError(
            f"{where}: a policy file needs two mappings, 'configs' and 'matchers', as in "
            f"{PRESETS / 'agoq.yaml'}."
        )
    for key in data:
        if key not in sections:
            line = lines.get((str(key),), "?")
            raise PolicyError(f"{where}: unknown top-level key {key!r} (line {line}).")


def _check_matcher(where: str, matcher, rules: dict[str, Rule]) -> None:
    wanted = ("config", "type", "pattern", "enabled")
    if not isinstance(matcher, dict) or not set(wanted) <= set(matcher):
        missing = [key for key in wanted if not isinstance(matcher, dict) or key not in matcher]
        raise PolicyError(
            f"{where} needs the keys config, type, pattern and enabled; missing are {', '.join(missing)}."
        )
    if not isinstance(matcher["config"], str) or not isinstance(matcher["enabled"], bool):
        raise PolicyError(f"{where}: config must be a name, and enabled true or false.")
    unknown = set(matcher) - set(wanted)
    if unknown:
        raise PolicyError(f"{where}: unknown keys {sorted(map(str, unknown))}.")
    if matcher["type"] != "glob":
        raise PolicyError(f"{where} has type {matcher['type']!r}; only 'glob' is known.")
    if not isinstance(matcher["pattern"], str):
        raise PolicyError(f"{where}: the pattern must be a string.")
    if matcher["config"] not in rules:
        raise PolicyError(
            f"{where} names config {matcher['config']!r}, which is not among the configs "
            f"({', '.join(map(repr, rules))})."
        )


def _rule(where: str, config, rounding: str) -> Rule:
    if not isinstance(config, dict) or "bits" not in config:
        raise PolicyError(f"{where} needs the key 'bits' (0, 2, 3, 4, 5, 6, 8 or 16).")
    unknown = set(config) - _FORMAT_KEYS
    if unknown:
        raise PolicyError(
            f"{where}: unknown keys {sorted(map(str, unknown))}; known are {sorted(_FORMAT_KEYS)}."
        )
    bits = config["bits"]
    for name in ("bits", "group", "scale_bits"):
        if type(config.get(name, 0)) is not int:
            raise PolicyError(f"{where}: {name} must be a whole number; got {config[name]!r}.")
    if bits in (0, KEEP_BITS) and not isinstance(bits, bool):
        if len(config) > 1:
            raise PolicyError(f"{where}: with bits {bits} nothing else may be set.")
        return Rule(keep=bits == KEEP_BITS)
    try:
        fmt = Format(**config)
        if rounding != "policy":
            fmt = replace(fmt, rounding=rounding)
    except (ValueError, TypeError) as error:
        raise PolicyError(f"{where}: {error}") from error
    return Rule(format=fmt)
