"""What the user asked for: options, presets and recipe files (TOML). Command line beats recipe beats preset beats default."""

from __future__ import annotations

import difflib
import numbers
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from relief_onnx.errors import OptionError, RecipeError
from relief_onnx.patterns import parse_pattern
from relief_onnx.training import TRAINING_FIELDS, Training, parse_training, parse_value

__all__ = ["CHOICES", "PRESETS", "Options", "granularity_of", "idle", "read_recipe", "resolve"]


@dataclass(frozen=True)
class Options:
    """The choices of one pruning run. `layers` are (regular expression, alpha) pairs; the first that matches a node or weight wins.

    `keep` is a share, in (0, 1]; `output_weight` are (output, weight) pairs.
    """

    alpha: float | None = None
    alpha_conv: float | None = None
    alpha_fc: float | None = None
    alpha_channel: float | None = None
    keep: float | None = None
    pattern: str | None = None
    criterion: str = "flow"
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
    mean_shift: str = "auto"
    allow_state_change: bool = False
    output_weight: tuple[tuple[str, float], ...] = ()
    layers: tuple[tuple[str, float], ...] = ()
    training: Training = field(default_factory=Training)

    @property
    def trains(self) -> bool:
        """Whether the weights that are left are trained again."""
        return self.repair in TRAINED

    @property
    def by_channel(self) -> bool:
        """Whether whole units go."""
        return self.granularity.startswith("channel")

    @property
    def by_flow(self) -> bool:
        """Whether R of units decides, alone or as the first step."""
        return self.criterion in BY_FLOW

    @property
    def fine(self) -> str | None:
        """What goes inside units: "connection", "weight" or nothing."""
        return self.granularity.removeprefix("channel").removeprefix("+") or None

    @property
    def scored(self) -> str:
        """What is measured: connections also where only whole units go."""
        return self.fine or "connection"

    @property
    def shifts_means(self) -> bool:
        """Whether biases take over the mean of what goes: asked for, or the criterion measures means anyway."""
        return self.mean_shift == "on" or (self.mean_shift == "auto" and self.by_flow)

    def unit_alpha_for(self, names: tuple[str, ...], convolution: bool) -> float:
        """The share of importance that the units kept of a layer's group carry."""
        chosen = (self.alpha, self.alpha_conv, self.alpha_fc) != (None, None, None) or self.layers
        if self.alpha_channel is None and chosen:
            return self.alpha_for(names, convolution)
        default = DEFAULT_FLOW_CHANNEL_ALPHA if self.by_flow else DEFAULT_CHANNEL_ALPHA
        return default if self.alpha_channel is None else self.alpha_channel

    @property
    def cuts_units(self) -> bool:
        """Whether units that lose everything leave the model; under a pattern only together with channels, as blocks would move."""
        return self.pattern is None or self.by_channel

    def layer_alpha(self, names: tuple[str, ...]) -> tuple[str, float] | None:
        """What [layers] of a recipe says about a layer: the pattern and its alpha."""
        return next(((pattern, alpha) for pattern, alpha in self.layers if any(re.search(pattern, name) for name in names)), None)

    def alpha_for(self, names: tuple[str, ...], convolution: bool) -> float:
        """The share of contribution that a layer keeps; of flow, that all layers with the same alpha keep together."""
        own = self.layer_alpha(names)
        if own is not None:
            return own[1]
        specific = self.alpha_conv if convolution else self.alpha_fc
        default = DEFAULT_FLOW_ALPHA if self.by_flow else DEFAULT_ALPHA[convolution]
        return next(value for value in (specific, self.alpha, default) if value is not None)


# More would only wait for each other while they are started.
MOST_THREADS = 1024

# Criteria that measure R of every unit.
BY_FLOW = ("flow", "flow-obs")

# Ways to repair that need gradients.
TRAINED = ("distill", "labels")

ALPHAS = ("alpha", "alpha_conv", "alpha_fc", "alpha_channel")

_FIELDS = (*(item.name for item in fields(Options) if item.name != "training"), *TRAINING_FIELDS)
_NAMES = (*_FIELDS, "preset")  # of a recipe


def _nearest(name: str, valid: tuple[str, ...]) -> str:
    return difflib.get_close_matches(name, valid, 1, 0.0)[0]


# Share kept where nothing is said: by kind (convolution or not). Nothing is retrained, so more is kept than in the paper.
DEFAULT_ALPHA: Mapping[bool, float] = {True: 0.98, False: 0.95}
# Of the flow of the whole network; of the relevance of all units.
DEFAULT_FLOW_ALPHA = 0.995
DEFAULT_FLOW_CHANNEL_ALPHA = 0.98
# Of the importance of a coupling group: channels share it more evenly than connections, so 0.98 would remove next to nothing.
DEFAULT_CHANNEL_ALPHA = 0.9

CHOICES: Mapping[str, tuple[str, ...]] = {
    "criterion": ("flow", "flow-obs", "relief", "relief-fast", "magnitude", "wanda"),
    "granularity": ("connection", "weight", "channel", "channel+connection", "channel+weight"),
    "repair": ("none", "least-squares", "distill", "labels"),
    "bias": ("keep", "prune"),
    "skip_rule": ("off", "branch", "both"),
    "silent": ("keep", "remove"),
    "storage": ("auto", "dense"),
    "mean_shift": ("auto", "on", "off"),
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # arXiv 2109.10795: mean of norms, biases and both sides of a skip connection may go, silent units go, the LeNets' alphas.
    "paper": {
        "criterion": "relief", "alpha_conv": 0.9, "alpha_fc": 0.95, "bias": "prune", "skip_rule": "both", "silent": "remove",
        "mean_shift": "off",
        # Where it is retrained: as the paper trains its LeNets.
        "epochs": 60, "batch": 120, "learning_rate": 1e-3, "weight_decay": 5e-4, "schedule": "step", "milestones": (0.5,),
    },
}  # fmt: skip

# Least values of whole numbers.
_LEAST: Mapping[str, int] = {"samples": 1, "threads": 0, "seed": 0, "round_to": 1}

# What an option must be (numpy's numbers count too), as what it is stored, and how to say so.
_TYPES: Mapping[str, tuple[type, type, str]] = {
    **dict.fromkeys(ALPHAS, (numbers.Real, float, "number")),
    **dict.fromkeys(_LEAST, (numbers.Integral, int, "whole number")),
}  # fmt: skip


def resolve(preset: str | None, recipe: Mapping[str, Any], given: Mapping[str, Any]) -> Options:
    """Merge the three sources and check the values. Raises OptionError, or RecipeError where the recipe has a part in it."""
    given = {key: _parsed(key, value) for key, value in {"preset": preset, **given}.items() if value is not None}
    try:
        return _merged({key: _parsed(key, value) for key, value in recipe.items()}, given)
    except OptionError as error:
        if recipe:
            raise RecipeError(str(error)) from error
        raise


def _merged(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> Options:
    """One set of options from values that are good each by itself."""
    preset = given.get("preset", recipe.get("preset"))
    values = {**PRESETS.get(preset, {}), **recipe}
    if "alpha" in given:
        # --alpha on the command line means both kinds, whatever a preset or recipe says about one of them.
        values = {key: value for key, value in values.items() if key not in ("alpha", "alpha_conv", "alpha_fc")}
    values = {key: value for key, value in {**values, **given}.items() if key != "preset"}
    if values.get("repair", "none") != "none" and values.get("rewind") is None:  # weights that start anew need no solve
        values.setdefault("criterion", "flow-obs")
    if values.get("criterion") == "flow-obs":
        values.setdefault("repair", "least-squares")
    training = {key: values.pop(key) for key in TRAINING_FIELDS if key in values}
    options = replace(Options(), **values, training=parse_training(training))
    _check_together(options)
    return options


def _check_together(options: Options) -> None:
    """Options that say two things about the same cut."""
    alphas = (options.alpha, options.alpha_conv, options.alpha_fc)
    if options.criterion == "flow-obs" and options.repair == "none":
        raise OptionError("criterion flow-obs chooses by what is left after repair; add --repair least-squares, or take --criterion flow")
    if options.keep is not None and alphas != (None, None, None) and options.fine in (None, options.granularity):
        raise OptionError("keep and alpha both say how much stays; give one of them")
    if options.keep is not None and options.by_channel and options.alpha_channel is not None:
        raise OptionError("keep and alpha-channel both say how many channels stay; give one of them")
    if options.pattern is not None and options.fine is None:
        raise OptionError("a pattern needs connections or weights; add --granularity weight, connection, or channel+weight")
    if options.pattern is not None and alphas != (None, None, None) and not options.by_channel:
        raise OptionError("alpha and pattern both say how many weights stay; give one of them")
    if options.pattern is not None and options.keep is not None and not options.by_channel:
        raise OptionError("keep and pattern both say how many weights stay; give one of them")
    if options.training.iterations > 1 and not options.trains:
        raise OptionError("iterations train the model again each time; add --repair distill, or --repair labels where the data has labels")


def _shown(key: str) -> str:
    """An option's name as the command line and a recipe write it."""
    return key.replace("_", "-")


def idle(options: Options, given: Mapping[str, Any], scores: object) -> list[str]:
    """A sentence for each option that was given and does nothing in this run."""
    found = [
        f"{_shown(key)} does nothing at granularity {options.granularity}; it needs channel, channel+connection or channel+weight"
        for key in ("alpha_channel", "round_to", "allow_state_change")
        if given.get(key) not in (None, False) and not options.by_channel
    ]
    if options.by_flow and given.get("bias") == "prune":
        found.append("bias prune does nothing by flow: a bias is constant, so no flow goes through it")
    if not options.by_flow and options.output_weight:
        found.append(f"output-weight does nothing by the criterion {options.criterion}; it needs flow")
    unused = [_shown(key) for key in TRAINING_FIELDS if given.get(key) is not None and not options.trains and key != "recalibrate"]
    if unused:
        found.append(f"{', '.join(unused)}: nothing is trained without --repair distill or --repair labels")
    if scores is not None and options.output_weight:
        found.append(f"output-weight does nothing: {scores} holds what was measured; give it to relief-onnx score")
    if scores is not None and given.get("criterion") is not None:
        found.append(f"criterion does nothing: {scores} holds what was measured; leave out --scores to measure again")
    return found


def granularity_of(text: str) -> str:
    """The name of a granularity, whatever the order and separator of its parts: "connection,channel" is "channel+connection"."""
    parts = sorted({part for part in re.split(r"[+,\s]+", text) if part}, key=lambda part: (part != "channel", part))
    return "+".join(parts)


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
    recipe: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in _NAMES:
            raise RecipeError(f"{path} has an unknown key {key!r}; did you mean {_shown(_nearest(name, _NAMES))!r}?")
        try:
            recipe[name] = _parsed(name, value)
        except OptionError as error:
            raise RecipeError(f"{path}: {error}") from error
    return recipe


def _parsed(name: str, value: Any) -> Any:
    """One value as it is stored. Raises OptionError where it means nothing, whatever the other options are."""
    if name not in _NAMES:
        raise OptionError(f"there is no option {name!r}; did you mean {_nearest(name, _FIELDS)!r}?")
    if name in TRAINING_FIELDS:
        return parse_value(name, value)
    found = _PARSERS[name](value) if name in _PARSERS else _typed(name, value)
    if name in _CHECKS:
        _CHECKS[name](name, found)
    return found


def _check_alpha(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        what = "importance" if name == "alpha_channel" else "contribution"
        raise OptionError(f"{_shown(name)} is {value}; it is the share of {what} to keep, above 0 and at most 1")


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise OptionError(
            f"{name} {pattern!r} is not a regular expression ({error}); escape special characters with a backslash"
        ) from error


def _check_choice(name: str, value: str) -> None:
    if value not in CHOICES[name]:
        raise OptionError(f"{_shown(name)} is {value!r}; choose one of {', '.join(CHOICES[name])}")


def _check_preset(_: str, value: str) -> None:
    if value not in PRESETS:
        raise OptionError(f"there is no preset {value}; the presets are {', '.join(PRESETS)}")


def _check_whole(name: str, value: int) -> None:
    if value < _LEAST[name]:
        raise OptionError(f"{_shown(name)} is {value}; give {_LEAST[name]} or more")
    if name == "threads" and value > MOST_THREADS:
        raise OptionError(f"threads is {value}; give {MOST_THREADS} or less, or 0 for one per core")


_CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(ALPHAS, _check_alpha), **dict.fromkeys(("skip", "only"), _check_pattern), **dict.fromkeys(CHOICES, _check_choice),
    **dict.fromkeys(_LEAST, _check_whole), "preset": _check_preset,
}  # fmt: skip


def _keep(value: Any) -> float:
    """A share from percent: "30%", "30" or 30. What `resolve` has made of a recipe already is taken as it is."""
    if isinstance(value, Share):
        return value
    text = str(value).strip()
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = 0.0
    if isinstance(value, bool) or not 0.0 < percent <= 100.0:
        raise OptionError(f"keep is {value!r}; give the percentage to keep, above 0 and at most 100, such as 30%")
    if percent < 1.0 and not text.endswith("%"):
        raise OptionError(f"keep is {value!r}, which could be {100 * percent:g} % or {percent:g} %; write it with the % sign")
    return Share(percent / 100.0)


class Share(float):
    """A share that has been read from a percentage."""


def _pattern(value: Any) -> str:
    if not isinstance(value, str):
        raise OptionError(f"pattern is {value!r}; it must be a string such as 2:4")
    parse_pattern(value)
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"allow-state-change is {value!r}; it must be true or false")
    return value


def _output_weights(value: Any) -> tuple[tuple[str, float], ...]:
    """Pairs from a table {output: weight}, or from texts NAME=W."""
    if isinstance(value, str):
        value = (value,)
    pairs = list(value.items()) if isinstance(value, dict) else [_pair(item) for item in value]
    for name, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, float | int) or not 0.0 <= weight < float("inf"):
            raise OptionError(f"output-weight of {name} is {weight!r}; it must be a number, 0 or more")
    return tuple((str(name), float(weight)) for name, weight in pairs)


def _pair(item: Any) -> tuple[str, float]:
    if isinstance(item, tuple) and len(item) == 2:
        return item
    name, equals, weight = str(item).rpartition("=")
    try:
        found = float(weight) if equals and name else None
    except ValueError:
        found = None
    if found is None:
        raise OptionError(f"output-weight is {item!r}; write NAME=W, the name of an output and a number")
    return name, found


def _typed(name: str, value: Any) -> Any:
    wanted, made, kind = _TYPES.get(name, (str, str, "string"))
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise OptionError(f"{_shown(name)} is {value!r}; it must be a {kind}")
    return made(value)


def _layers(value: Any) -> tuple[tuple[str, float], ...]:
    """Pairs from a table {pattern: alpha}, or pairs."""
    pairs = value.items() if isinstance(value, dict) else value
    if not isinstance(value, dict | tuple) or not all(isinstance(alpha, float | int) and not isinstance(alpha, bool) for _, alpha in pairs):
        raise OptionError('[layers] must hold lines such as "regular expression" = 0.99')
    for pattern, alpha in pairs:
        _check_pattern("layer pattern", pattern)
        _check_alpha("alpha of a layer", float(alpha))
    return tuple((pattern, float(alpha)) for pattern, alpha in pairs)


_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    "layers": _layers, "keep": _keep, "pattern": _pattern, "output_weight": _output_weights, "allow_state_change": _flag,
    "granularity": lambda value: granularity_of(_typed("granularity", value)),
}  # fmt: skip
