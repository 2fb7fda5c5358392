"""Schedule-free optimizers. They need torch only and work in any training loop."""

from hf_schedulefree.optim.adamw import AdamWScheduleFree
from hf_schedulefree.optim.base import ScheduleFreeOptimizer

__all__ = ["AdamWScheduleFree", "ScheduleFreeOptimizer"]
