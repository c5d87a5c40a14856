"""What the user asked for: options, presets and recipe files (TOML). Command line beats recipe beats preset beats default."""

from __future__ import annotations

import difflib
import numbers
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from relief_onnx.errors import RecipeError

__all__ = ["CHOICES", "PRESETS", "Options", "granularity_of", "idle", "read_recipe", "resolve"]


@dataclass(frozen=True)
class Options:
    """The choices of one pruning run. `layers` are (regular expression, alpha) pairs; the first that matches a node or weight wins."""

    alpha: float | None = None
    alpha_conv: float | None = None
    alpha_fc: float | None = None
    alpha_channel: float | None = None
    criterion: str = "relief"
    granularity: str = "connection"
    repair: str = "none"
    bias: str = "keep"
    skip_rule: str = "off"
    silent: str = "keep"
    skip: str | None = None
    only: str | None = None
    storage: str = "auto"
    samples: int | None = None
    seed: int = 0
    threads: int = 0
    round_to: int = 8
    layers: tuple[tuple[str, float], ...] = ()

    @property
    def by_channel(self) -> bool:
        """Whether whole units go."""
        return self.granularity.startswith("channel")

    @property
    def fine(self) -> str | None:
        """What goes inside units: "connection", "weight" or nothing."""
        return self.granularity.removeprefix("channel").removeprefix("+") or None

    @property
    def scored(self) -> str:
        """What is measured: connections also where only whole units go."""
        return self.fine or "connection"

    def unit_alpha_for(self, names: tuple[str, ...], convolution: bool) -> float:
        """The share of importance that the units kept of a layer's group carry."""
        chosen = (self.alpha, self.alpha_conv, self.alpha_fc) != (None, None, None) or self.layers
        if self.alpha_channel is None and chosen:
            return self.alpha_for(names, convolution)
        return DEFAULT_CHANNEL_ALPHA if self.alpha_channel is None else self.alpha_channel

    def alpha_for(self, names: tuple[str, ...], convolution: bool) -> float:
        """The share of contribution that a layer keeps."""
        for pattern, alpha in self.layers:
            if any(re.search(pattern, name) for name in names):
                return alpha
        specific = self.alpha_conv if convolution else self.alpha_fc
        return next(value for value in (specific, self.alpha, DEFAULT_ALPHA[convolution]) if value is not None)


_FIELDS = tuple(item.name for item in fields(Options))


def _nearest(name: str, valid: tuple[str, ...]) -> str:
    return difflib.get_close_matches(name, valid, 1, 0.0)[0]


# Share kept where nothing is said: by kind (convolution or not). Nothing is retrained, so more is kept than in the paper.
DEFAULT_ALPHA: Mapping[bool, float] = {True: 0.98, False: 0.95}
# Of the importance of a coupling group: channels share it more evenly than connections, so 0.98 would remove next to nothing.
DEFAULT_CHANNEL_ALPHA = 0.9

CHOICES: Mapping[str, tuple[str, ...]] = {
    "criterion": ("relief", "relief-fast", "magnitude", "wanda"),
    "granularity": ("connection", "weight", "channel", "channel+connection", "channel+weight"),
    "repair": ("none",),
    "bias": ("keep", "prune"),
    "skip_rule": ("off", "branch", "both"),
    "silent": ("keep", "remove"),
    "storage": ("auto", "dense"),
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # arXiv 2109.10795: mean of norms, biases and both sides of a skip connection may go, silent units go, the LeNets' alphas.
    "paper": {
        "criterion": "relief", "alpha_conv": 0.9, "alpha_fc": 0.95, "bias": "prune", "skip_rule": "both", "silent": "remove",
    },
}  # fmt: skip

# What an option must be (numpy's numbers count too), as what it is stored, and how to say so.
_TYPES: Mapping[str, tuple[type, type, str]] = {
    **dict.fromkeys(("alpha", "alpha_conv", "alpha_fc", "alpha_channel"), (numbers.Real, float, "number")),
    **dict.fromkeys(("samples", "seed", "threads", "round_to"), (numbers.Integral, int, "whole number")),
}  # fmt: skip


def resolve(preset: str | None, recipe: Mapping[str, Any], given: Mapping[str, Any]) -> Options:
    """Merge the three sources and check the values. Raises RecipeError with one sentence."""
    name = recipe.get("preset") if preset is None else preset
    if name is not None and name not in PRESETS:
        raise RecipeError(f"there is no preset {name}; the presets are {', '.join(PRESETS)}")
    values = {**(PRESETS[name] if name else {}), **{key: value for key, value in recipe.items() if key != "preset"}}
    alphas = ("alpha", "alpha_conv", "alpha_fc")
    if given.get("alpha") is not None:
        # --alpha on the command line means both kinds, whatever a preset or recipe says about one of them.
        values = {key: value for key, value in values.items() if key not in alphas}
    values.update({key: value for key, value in given.items() if value is not None})
    for key in values:
        if key not in _FIELDS:
            raise RecipeError(f"there is no option {key!r}; did you mean {_nearest(key, _FIELDS)!r}?")
    values = {key: _layers("", value) if key == "layers" else _typed("", key, value) for key, value in values.items()}
    if "granularity" in values:
        values["granularity"] = granularity_of(values["granularity"])
    options = replace(Options(), **values)
    for key in (*alphas, "alpha_channel"):
        _check_alpha(key, getattr(options, key))
    for _, alpha in options.layers:
        _check_alpha("alpha of a layer", alpha)
    for key, choices in CHOICES.items():
        if getattr(options, key) not in choices:
            raise RecipeError(f"{_shown(key)} is {getattr(options, key)!r}; choose one of {', '.join(choices)}")
    for key in ("skip", "only"):
        _check_pattern(key, getattr(options, key))
    for key, least in (("samples", 1), ("threads", 0), ("seed", 0), ("round_to", 1)):
        value = getattr(options, key)
        if value is not None and value < least:
            raise RecipeError(f"{_shown(key)} is {value}; give {least} or more")
    return options


def _shown(key: str) -> str:
    """An option's name as the command line and a recipe write it."""
    return key.replace("_", "-")


def idle(options: Options, given: Mapping[str, Any], scores: object) -> list[str]:
    """A sentence for each option that was given and does nothing in this run."""
    found = [
        f"{_shown(key)} does nothing at granularity {options.granularity}; it needs channel, channel+connection or channel+weight"
        for key in ("alpha_channel", "round_to")
        if given.get(key) is not None and not options.by_channel
    ]
    if scores is not None and given.get("criterion") is not None:
        found.append(f"criterion does nothing: {scores} holds what was measured; leave out --scores to measure again")
    return found


def granularity_of(text: str) -> str:
    """The name of a granularity, whatever the order and separator of its parts: "connection,channel" is "channel+connection"."""
    parts = sorted({part for part in re.split(r"[+,\s]+", text) if part}, key=lambda part: (part != "channel", part))
    return "+".join(parts)


def _check_alpha(key: str, value: float | None) -> None:
    if value is not None and not 0.0 < value <= 1.0:
        what = "importance" if key == "alpha_channel" else "contribution"
        raise RecipeError(f"{_shown(key)} is {value}; it is the share of {what} to keep, above 0 and at most 1")


def _check_pattern(key: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise RecipeError(f"{key} {pattern!r} is not a regular expression ({error}); escape special characters with a backslash") from error


def read_recipe(path: Path) -> dict[str, Any]:
    """A TOML file with the option names as keys, and `[layers]` with "regular expression" = alpha. Raises RecipeError."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist; check the path of the recipe") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text; write the recipe as a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML ({error}); correct that line") from error
    valid = (*_FIELDS, "preset")
    recipe: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in valid:
            raise RecipeError(f"{path} has an unknown key {key!r}; did you mean {_shown(_nearest(name, valid))!r}?")
        recipe[name] = _layers(f"{path}: ", value) if name == "layers" else _typed(f"{path}: ", name, value)
    return recipe


def _typed(where: str, name: str, value: Any) -> Any:
    wanted, made, kind = _TYPES.get(name, (str, str, "string"))
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise RecipeError(f"{where}{_shown(name)} is {value!r}; it must be a {kind}")
    return made(value)


def _layers(where: str, value: Any) -> tuple[tuple[str, float], ...]:
    """Pairs from a table {pattern: alpha}; pairs are taken as they are."""
    if isinstance(value, tuple):
        return value
    if not isinstance(value, dict) or not all(isinstance(item, float | int) for item in value.values()):
        raise RecipeError(f'{where}[layers] must hold lines such as "regular expression" = 0.99')
    for pattern in value:
        _check_pattern(f"{where}layer pattern", pattern)
    return tuple((pattern, float(alpha)) for pattern, alpha in value.items())
