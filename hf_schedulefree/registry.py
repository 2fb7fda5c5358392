"""Optimizer names: the only place that touches transformers' tables.

`register_optimizers` makes each name a real member of `OptimizerNames` and gives it a handler, so that
`TrainingArguments(optim="adamw_schedulefree")` works wherever arguments come from (Python, command line, YAML, a
subclass). The member pickles as its plain string: a `training_args.bin` loads where this package is not installed.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers.trainer
from transformers import TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext
from transformers.training_args import OptimizerNames

from hf_schedulefree.optim import AdamWScheduleFree, RAdamScheduleFree, ScheduleFreeOptimizer, SGDScheduleFree


@dataclass(frozen=True)
class OptimizerSpec:
    """A name, the optimizer behind it, and where its arguments come from.

    Args:
        name: what users write in `TrainingArguments(optim=...)`.
        optimizer_class: the optimizer.
        fields: argument of the optimizer -> how to read it from `TrainingArguments`.
        options: key accepted in `TrainingArguments(optim_args="key=value,...")` -> how to parse its value.
    """

    name: str
    optimizer_class: type[ScheduleFreeOptimizer]
    fields: Mapping[str, Callable[[TrainingArguments], Any]]
    options: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)

    def kwargs(self, args: TrainingArguments) -> dict[str, Any]:
        """The optimizer's keyword arguments, parsed and checked.

        `warmup_steps` is not among them: it may be a ratio and is resolved when the number of steps is known.

        Raises:
            ValueError: `optim_args` or a field of `args` is malformed, unknown or out of range.
        """
        kwargs = {argument: read(args) for argument, read in self.fields.items()}
        kwargs.update(self._parse(args.optim_args))
        try:
            self.optimizer_class([torch.zeros(1)], **kwargs)
        except ValueError as error:
            raise ValueError(f"optim={self.name!r}: {error}. {self._accepted()}") from error
        return kwargs

    def _parse(self, text: str | None) -> dict[str, Any]:
        parsed: dict[str, Any] = {}
        if text is not None and not isinstance(text, str):  # a mapping, in a YAML file
            raise ValueError(
                f"optim={self.name!r}, optim_args={text!r}: expected a text of the form 'key=value,key=value', not "
                f"{type(text).__name__}. {self._accepted()}"
            )
        for pair in (text or "").split(",") if (text or "").strip() else ():
            key, equals, value = (part.strip() for part in pair.partition("="))
            if not (key and equals and value):
                problem = f"{pair.strip()!r} is not of the form key=value"
            elif key not in self.options:
                problem = f"unknown key {key!r}"
            elif key in parsed:
                problem = f"{key!r} is given twice"
            else:
                try:
                    parsed[key] = self.options[key](value)
                    continue
                except ValueError:
                    problem = f"{value!r} is no value for {key!r}"
            raise ValueError(f"optim={self.name!r}, optim_args={text!r}: {problem}. {self._accepted()}")
        return parsed

    def _accepted(self) -> str:
        return f"Keys accepted in optim_args: {', '.join(sorted(self.options))}."


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _number(value: Any) -> Any:
    """In YAML, 1e-3 is a text (1.0e-3 is a number); what is no number at all is left for the optimizer to refuse."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


_COMMON_FIELDS = {
    "lr": lambda args: _number(args.learning_rate),
    "weight_decay": lambda args: _number(args.weight_decay),
    "rounding_seed": lambda args: args.seed,
}
_COMMON_OPTIONS = {
    "r": float,
    "weight_lr_power": float,
    "implementation": str,
    "park": str,
    "state_precision": str,
    "rounding_seed": int,
    "capturable": _parse_bool,
}
_ADAM_FIELDS = {
    **_COMMON_FIELDS,
    "betas": lambda args: (_number(args.adam_beta1), _number(args.adam_beta2)),
    "eps": lambda args: _number(args.adam_epsilon),
}

SPECS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        OptimizerSpec("adamw_schedulefree", AdamWScheduleFree, _ADAM_FIELDS, _COMMON_OPTIONS),
        OptimizerSpec("sgd_schedulefree", SGDScheduleFree, _COMMON_FIELDS, {**_COMMON_OPTIONS, "momentum": float}),
        OptimizerSpec(
            "radam_schedulefree", RAdamScheduleFree, _ADAM_FIELDS, {**_COMMON_OPTIONS, "silent_sgd_phase": _parse_bool}
        ),
    )
}


def spec_for(args: TrainingArguments) -> OptimizerSpec | None:
    """The spec that `args.optim` names, or None for any other optimizer."""
    return SPECS.get(getattr(args.optim, "value", args.optim))


def names_schedule_free(args: TrainingArguments) -> bool:
    """Whether `args.optim` is one of these, or of those that transformers takes from the `schedulefree` package."""
    name = str(getattr(args.optim, "value", args.optim))
    return name in SPECS or name.startswith("schedule_free")


def register_optimizers() -> None:
    """Make every name of `SPECS` known to transformers. May be called any number of times.

    Raises:
        RuntimeError: transformers (or another extension) already uses one of the names.
    """
    for name in SPECS:
        handler = _OPTIMIZER_HANDLERS.get(name)
        if handler is not None and handler.__module__ != __name__:
            raise RuntimeError(
                f"optim={name!r} is already registered, by {handler.__module__}.{handler.__qualname__}; "
                "hf_schedulefree does not replace it"
            )
        if handler is None and name in OptimizerNames._value2member_map_:
            raise RuntimeError(
                f"optim={name!r} is already a member of OptimizerNames; hf_schedulefree does not replace it"
            )
        member = OptimizerNames._value2member_map_.get(name) or _add_optimizer_name(name)
        # A member's hash is that of its NAME, not of its value: unpickled arguments look the plain string up.
        _OPTIMIZER_HANDLERS[member] = _OPTIMIZER_HANDLERS[name] = _handle
    _explain_malformed_optim_args()


def _handle(context: OptimizerContext) -> tuple[type[ScheduleFreeOptimizer], dict[str, Any]]:
    """The entry in transformers' table: optimizer class and keyword arguments."""
    spec = spec_for(context.args)
    return spec.optimizer_class, spec.kwargs(context.args)


def _add_optimizer_name(value: str) -> OptimizerNames:
    """Add a member to `OptimizerNames`. Can go when transformers lets extensions register an optimizer."""
    name = value.upper()
    member = str.__new__(OptimizerNames, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = OptimizerNames
    member._sort_order_ = len(OptimizerNames._member_names_)
    # Pickled by name, the member could not be loaded by a process without this package.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    type.__setattr__(OptimizerNames, name, member)
    OptimizerNames._member_names_.append(name)
    OptimizerNames._member_map_[name] = member
    OptimizerNames._value2member_map_[value] = member
    hashable_values = getattr(OptimizerNames, "_hashable_values_", None)  # Python >= 3.13
    if hashable_values is not None:
        hashable_values.append(value)
    return member


def _explain_malformed_optim_args() -> None:
    """Name the malformed pair when transformers cannot split `optim_args`.

    Its parser runs before any handler and fails with "not enough values to unpack". Can go when it says more.
    """
    parse = transformers.trainer._parse_optim_args
    if getattr(parse, "__module__", None) == __name__:
        return

    @functools.wraps(parse)
    def parse_or_explain(optim_args_str: str | None) -> dict[str, str]:
        try:
            return parse(optim_args_str)
        except (ValueError, AttributeError) as error:  # the latter: it is no text
            accepted = " ".join(f"{name}: {', '.join(sorted(spec.options))}." for name, spec in SPECS.items())
            raise ValueError(
                f"optim_args={optim_args_str!r} is not of the form key=value,key=value. Keys accepted by {accepted}"
            ) from error

    parse_or_explain.__module__ = __name__
    transformers.trainer._parse_optim_args = parse_or_explain
