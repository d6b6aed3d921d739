"""The house: the paper on top, what carries it in rooms below, arrows one way."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS: dict[str, set[str]] = {  # room -> the rooms that it may import
    "common": set(),
    "targets": {"common"},
    "teacher": {"common", "targets"},
    "evaluation": {"common", "targets", "teacher"},
}
# know no class of U-Net
METHOD = ("gates", "latency", "losses", "macs", "router", "sinkhorn", "train")
TOP = {path.stem for path in ROOT.glob("*.py")}
ROOMS["sharing"] = {*ROOMS, *TOP}  # no arrow leads to it
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
    for folder in ("*.py", *(f"{room}/**/*.py" for room in ROOMS))
    for path in ROOT.glob(folder)
}


def room_of(name: str) -> str:
    """The room of a dotted name; a top-level module is its own."""
    return name.partition(".")[0]


def arrows(source: str) -> set[str]:
    """Where the imports of a source lead, those in functions and for types included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0  # a relative import hides where it leads
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {room_of(name) for name in names} & {*ROOMS, *TOP, "bench", "docs", "tests"}


def test_the_top_level_is_the_paper_one_concept_a_file():
    assert 14 <= len(TOP) <= 17, TOP
    for name, source in MODULES.items():
        first = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].partition(":")[0]
        assert not re.search(r"[;,] and |; ", first), f"{name} holds two concepts: {first}"


def test_functions_fit_on_a_screen():
    long = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, source in MODULES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert not long


def test_only_prune_unet_knows_the_classes_of_the_unet():
    for name in METHOD:
        assert not re.search(r"^\s*(from|import) diffusers", MODULES[name], re.M), name
        assert "UNet2D" not in MODULES[name], name
    assert "UNet2DConditionModel" in MODULES["prune_unet"]
    assert "common" in arrows(MODULES["settings"]) and arrows(MODULES["settings"]) == {"common"}


def test_rooms_import_only_the_rooms_below_them():
    assert len(MODULES) > 30 and {room_of(name) for name in MODULES} == {*ROOMS, *TOP}
    rooms = {name: source for name, source in MODULES.items() if room_of(name) in ROOMS}
    up = {n: arrows(s) - ROOMS[room_of(n)] - {room_of(n)} for n, s in rooms.items()}
    assert not {name: found for name, found in up.items() if found}
    assert not [name for name in TOP if "sharing" in arrows(MODULES[name])]


def test_the_top_level_has_no_circle():
    graph = {name: arrows(MODULES[name]) & TOP for name in TOP}
    assert graph["train"] >= {"router", "losses", "gates"}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_imports_in_functions_and_for_types_count():
    source = (
        "import gates\ndef f():\n    from router import x\nif TYPE_CHECKING:\n    import train as t"
    )
    assert arrows(source) == {"gates", "router", "train"}
