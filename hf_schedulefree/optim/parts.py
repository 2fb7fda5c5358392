"""`GroupParts`: counters of parameter groups that are stepped in parts.

DeepSpeed ZeRO-3 calls step() once per sub-group: `params` then holds one part of a group, is empty in the other
groups, and each part has made its own number of steps. As soon as a group turns out to be stepped in parts, the
counters of each part are kept with its parameters, and the group shows those of the part stepped last.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hf_schedulefree.optim.capturable import COUNTERS

States = Mapping[Tensor, dict[str, Any]]


class GroupParts:
    """What is known of the parts of an optimizer's groups. Groups are known by id: ZeRO-1 and -2 show one at a time."""

    def __init__(self) -> None:
        self._groups: dict[int, Mapping[str, Any]] = {}  # kept, so that no other group gets the id of one
        self._stepped: dict[int, list[Tensor]] = {}  # the parameters that a group stepped last
        self._before: dict[int, dict[str, float]] = {}  # its counters before its first step here
        self._in_parts: set[int] = set()  # the groups that are stepped in parts

    def recall(self, group: dict[str, Any], states: States) -> None:
        """Before a step: give the group the counters of the parameters that it holds now."""
        if group["capturable"]:
            return
        key = id(group)
        started = (states[p] for p in group["params"] if "z" in states.get(p, ()))
        own = next((state.get("counters") for state in started), None)
        stepped = self._stepped.get(key)
        if stepped is None:
            self._groups[key] = group
            self._before[key] = _counters(group)
        elif key not in self._in_parts and stepped[0] is not group["params"][0]:
            if set(map(id, stepped)).isdisjoint(map(id, group["params"])):
                self._in_parts.add(key)
                _store(group, stepped, states)
        if own is not None:
            self._in_parts.add(key)
            group.update(own)
        elif key in self._in_parts:
            group.update(self._before[key])

    def keep(self, group: dict[str, Any], states: States) -> None:
        """After a step: keep the group's counters with its parameters, if the group is stepped in parts."""
        if group["capturable"]:
            return
        self._stepped[id(group)] = list(group["params"])
        if id(group) in self._in_parts:
            _store(group, group["params"], states)


def _counters(group: Mapping[str, Any]) -> dict[str, float]:
    return {name: group[name] for name in COUNTERS}


def _store(group: Mapping[str, Any], params: Iterable[Tensor], states: States) -> None:
    for p in params:
        if "z" in states.get(p, ()):
            states[p]["counters"] = _counters(group)
