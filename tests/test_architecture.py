"""The rooms of the house: who may import whom, and which library stays in which room."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_schedulefree"
MODULES = {
    ".".join(("hf_schedulefree", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From the bottom up; a module imports from its own floor and from those below.
FLOORS = [
    [f"hf_schedulefree.optim.{name}" for name in ("averaging", "directions", "pages", "precision", "sharding")],
    ["hf_schedulefree.optim.kernels"],
    ["hf_schedulefree.optim", "hf_schedulefree.rng"],
    ["hf_schedulefree.weights", "hf_schedulefree.checkpoint"],
    ["hf_schedulefree.registry"],
    ["hf_schedulefree.trainer"],
    ["hf_schedulefree.cli", "hf_schedulefree.__main__"],
]
TRAINER_FLOOR = next(index for index, floor in enumerate(FLOORS) if "hf_schedulefree.trainer" in floor)

# library -> the rooms that may import it. TRL and PEFT are composed with in tests only.
ROOMS = {
    "accelerate": ["hf_schedulefree.weights"],
    "deepspeed": ["hf_schedulefree.weights"],
    "safetensors": ["hf_schedulefree.checkpoint"],
    "triton": ["hf_schedulefree.optim.kernels"],
    "numba": ["hf_schedulefree.optim.kernels.sources"],
    "llvmlite": ["hf_schedulefree.optim.kernels.sources"],
    "schedulefree": [],
    "pytorch_optimizer": [],
    "trl": [],
    "peft": [],
}

# Below the Trainer: the stock Trainer numbers the parameters in its checkpoints by a model that transformers builds.
TRANSFORMERS_BELOW = ["hf_schedulefree.checkpoint.matching"]


def imports(module: str) -> set[str]:
    """Every module that a module imports anywhere in its code, except for type checkers only."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inside or {node.module}
            assert node.level == 0, f"{module} imports relatively"
    return found


def within(module: str, rooms: list[str]) -> bool:
    return any(module == room or module.startswith(room + ".") for room in rooms)


def floor_of(module: str) -> int:
    """The floor by the longest room name that fits; what stands beside the Trainer is on its floor."""
    fitting = [(len(room), index) for index, floor in enumerate(FLOORS) for room in floor if within(module, [room])]
    return max(fitting)[1] if fitting else TRAINER_FLOOR


def test_there_is_a_house():
    assert {"hf_schedulefree.optim.base", "hf_schedulefree.trainer", "hf_schedulefree.registry"} <= MODULES.keys()
    assert floor_of("hf_schedulefree.optim.averaging") == 0 and floor_of("hf_schedulefree.hub") == TRAINER_FLOOR


@pytest.mark.parametrize("module", [name for name in MODULES if name != "hf_schedulefree"])
def test_imports_point_downward(module):
    for imported in imports(module):
        if imported.startswith("hf_schedulefree."):
            assert floor_of(imported) <= floor_of(module), f"{module} imports {imported}"
        if floor_of(module) < len(FLOORS) - 1:
            assert imported != "hf_schedulefree", f"{module} imports the package's top, which imports everything"


@pytest.mark.parametrize("module", MODULES)
def test_each_library_in_its_room(module):
    for library in {name.partition(".")[0] for name in imports(module)}:
        if library in ROOMS:
            assert within(module, ROOMS[library]), f"{module} imports {library}"
        if library == "transformers":
            assert floor_of(module) >= TRAINER_FLOOR - 1 or module in TRANSFORMERS_BELOW, (
                f"{module} imports transformers"
            )


def test_the_optimizers_know_torch_only():
    allowed = {"torch", "hf_schedulefree", "llvmlite", "numba", "numpy", "triton", *sys.stdlib_module_names}
    for module in MODULES:
        if within(module, ["hf_schedulefree.optim"]):
            assert {name.partition(".")[0] for name in imports(module)} <= allowed, module


def test_nothing_prints():
    for module, path in MODULES.items():
        if floor_of(module) < len(FLOORS) - 1:
            calls = [
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
            ]
            assert not [call for call in calls if getattr(call.func, "id", None) == "print"], module
