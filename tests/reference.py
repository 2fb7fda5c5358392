"""The method as the paper writes it: x, y, z in float64, nothing eliminated, nothing shared with the package.

Defazio et al. 2024, https://arxiv.org/abs/2405.15682, equations 2 to 4 and algorithm 1; RAdam's rectification after
Liu et al. 2020, https://arxiv.org/abs/1908.03265, algorithm 2.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass
class Sequences:
    """x, y, z and v of one parameter; all start at the initial weights, v at zero."""

    initial: Tensor
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    z: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x, self.y, self.z = (self.initial.detach().double().clone() for _ in range(3))
        self.v = torch.zeros_like(self.x)


@dataclass
class Reference:
    """One parameter group. `step` takes the gradients at y (None: this parameter had none) and moves everything on.

    A parameter starts (x = y = z) at its first gradient, however many steps the group has made by then.
    """

    kind: Literal["adamw", "sgd", "radam"]
    parameters: list[Sequences]
    lr: float
    beta: float
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0
    silent_sgd_phase: bool = True
    t: int = 0
    largest_rate: float = 0.0
    sum_of_weights: float = 0.0

    def step(self, grads: list[Tensor | None]) -> None:
        self.t += 1
        rate = self.lr * self._rate_factor()
        self.largest_rate = max(self.largest_rate, rate)
        weight = self.t**self.r * self.largest_rate**self.weight_lr_power
        self.sum_of_weights += weight
        c = weight / self.sum_of_weights if self.sum_of_weights > 0 else 0.0
        for s, g in zip(self.parameters, grads, strict=True):
            if g is None:
                continue
            d = self._direction(s, g.double()) + self.weight_decay * s.y
            s.z = s.z - rate * d
            s.x = (1 - c) * s.x + c * s.z
            s.y = (1 - self.beta) * s.z + self.beta * s.x

    def _direction(self, s: Sequences, g: Tensor) -> Tensor:
        if self.kind == "sgd":
            return g
        s.v = self.beta2 * s.v + (1 - self.beta2) * g**2
        if self.kind == "radam" and self._length() <= 4:
            return g
        return g / ((s.v / (1 - self.beta2**self.t)).sqrt() + self.eps)

    def _length(self) -> float:
        return 2 / (1 - self.beta2) - 1 - 2 * self.t * self.beta2**self.t / (1 - self.beta2**self.t)

    def _rate_factor(self) -> float:
        if self.kind == "radam":
            rho, rho_inf = self._length(), 2 / (1 - self.beta2) - 1
            if rho <= 4:
                return 0.0 if self.silent_sgd_phase else 1.0
            return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        return min(1.0, self.t / self.warmup_steps) if self.warmup_steps else 1.0


def reference_for(kind: Literal["adamw", "sgd", "radam"], options: dict[str, Any], tensors: list[Tensor]) -> Reference:
    """A `Reference` from the options of the optimizers (betas or momentum, lr, ...)."""
    options = dict(options)
    betas = options.pop("betas", (0.9, 0.999))
    beta = options.pop("momentum", betas[0])
    return Reference(kind, [Sequences(t) for t in tensors], beta=beta, beta2=betas[1], **options)
