"""Which values each option of an optimizer may take, and what is said about others."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from hf_schedulefree.optim import precision


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):  # the latter two for tensors of several elements
        return False


# option -> (is it valid, the range in words), for the options of all optimizers.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda v: _finite(v) and v >= 0, "a finite number >= 0"),
    "weight_decay": (lambda v: _finite(v) and v >= 0, "a finite number >= 0"),
    "warmup_steps": (lambda v: _finite(v) and v >= 0 and v == int(v), "a whole number of steps >= 0"),
    "r": (lambda v: _finite(v) and v >= 0, "a finite number >= 0"),
    "weight_lr_power": (lambda v: _finite(v) and v >= 0, "a finite number >= 0"),
    "eps": (lambda v: _finite(v) and v >= 0, "a finite number >= 0"),
    "silent_sgd_phase": (lambda v: isinstance(v, bool), "True or False"),
    "momentum": (lambda v: _finite(v) and 0 < v < 1, "a number in (0, 1); at 0 the average x could not be recovered"),
    "state_precision": (
        lambda v: v is None or v in precision.STATE_PRECISIONS,
        f"None or one of {precision.STATE_PRECISIONS}",
    ),
    "capturable": (lambda v: isinstance(v, bool), "True or False"),
    "rounding_seed": (lambda v: isinstance(v, int), "a whole number"),
    "betas": (
        lambda v: len(v) == 2 and all(map(_finite, v)) and 0 < v[0] < 1 and 0 <= v[1] < 1,
        "(beta1, beta2) with beta1 in (0, 1) and beta2 in [0, 1); at beta1 = 0 the average x could not be recovered",
    ),
}


def check_options(optimizer: str, options: Mapping[str, Any]) -> None:
    """Check option values; names that are no option of any optimizer (a group's counters, ...) are left alone.

    Raises:
        ValueError: a value is out of range; the message names the optimizer, the option, its value and the range.
    """
    for name, value in options.items():
        if name not in _RANGES:
            continue
        is_valid, expected = _RANGES[name]
        try:
            valid = is_valid(value)
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(f"{optimizer}: {name}={value!r} is out of range; expected {expected}")
