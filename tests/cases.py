"""The matrix that the optimizer tests run over: one row per optimizer."""

from dataclasses import dataclass, field
from typing import Any

import schedulefree

from hf_schedulefree.optim import AdamWScheduleFree, RAdamScheduleFree, ScheduleFreeOptimizer, SGDScheduleFree


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer, its counterpart in `schedulefree` 1.4.1, and option sets that between them use every option."""

    kind: str
    ours: type[ScheduleFreeOptimizer]
    theirs: type
    lr: float
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def beta_option(self) -> dict[str, Any]:
        """A beta other than the default, in this optimizer's spelling."""
        return {"momentum": 0.8} if self.kind == "sgd" else {"betas": (0.8, 0.98)}

    def options(self, setting: str) -> dict[str, Any]:
        return {"lr": self.lr, **self.settings[setting]}


_COMMON = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "weighting": {"r": 1.5, "weight_lr_power": 1.0},
}
_WARM_UP = {
    "warm-up": {"warmup_steps": 40},
    "everything": {"warmup_steps": 25, "weight_decay": 0.05, "r": 0.5, "weight_lr_power": 0.0},
}

CASES = {
    case.kind: case
    for case in (
        OptimizerCase(
            "adamw",
            AdamWScheduleFree,
            schedulefree.AdamWScheduleFree,
            0.01,
            {**_COMMON, **_WARM_UP, "betas": {"betas": (0.98, 0.95), "eps": 1e-6}},
        ),
        OptimizerCase(
            "sgd",
            SGDScheduleFree,
            schedulefree.SGDScheduleFree,
            0.2,
            {**_COMMON, **_WARM_UP, "momentum": {"momentum": 0.6}},
        ),
        OptimizerCase(
            "radam",
            RAdamScheduleFree,
            schedulefree.RAdamScheduleFree,
            0.01,
            {
                **_COMMON,
                "betas": {"betas": (0.95, 0.95), "eps": 1e-6},
                "sgd-phase": {"silent_sgd_phase": False, "lr": 0.005},
            },
        ),
    )
}

ALL_SETTINGS = [(kind, setting) for kind, case in CASES.items() for setting in case.settings]
