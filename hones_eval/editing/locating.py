"""Match the boxes of a record to the names in its question.

In the released files `involved_objects` is an unordered set, while `object_positions` follows the question's
program: one box for each scene-graph id, in the order in which ids first appear in `semantic`. So names are
matched to boxes through the program, and in the order given only where a record has no program.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hones_eval.editing.boxes import Box
from hones_eval.editing.problems import RecordError
from hones_eval.editing.questions import place_of

SceneGraphs = Mapping[str, Mapping[str, Any]]


class Node(NamedTuple):
    """One step of a program that names a thing: its words, its scene-graph id, its part in a relation."""

    words: str
    identity: str
    role: str
    """`s` or `o` where the step relates it, else empty."""


def locate(row: Mapping[str, Any], question: str, graphs: SceneGraphs) -> list[tuple[str, Box | None]]:
    """Return the names that the question is about with their boxes, in the order of the question.

    Raises: RecordError when it is unclear which box belongs to which name.
    """
    names = row.get("involved_objects") or row.get("relevant_objects") or []
    if not isinstance(names, list) or not names:
        raise RecordError("it names no object ('involved_objects' is missing or empty)")
    names = [str(item) for item in names]
    nodes = _nodes(row.get("semantic"))
    boxes = _boxes(row, nodes, graphs)
    owners = _by_program(names, nodes, question) if nodes else names
    if not nodes and len(boxes) > len(names):
        raise RecordError(f"it has {len(boxes)} boxes for {len(names)} names")
    found: dict[str, Box | None] = dict.fromkeys(names)
    for name, box in zip(owners, boxes, strict=False):
        if name is not None and found[name] is None:
            found[name] = box
    ordered = sorted(names, key=lambda name: place_of(name, question))
    return [(name, found[name]) for name in dict.fromkeys(ordered)]


def how_many(name: str, row: Mapping[str, Any], graphs: SceneGraphs) -> int | None:
    """The number of things with that name in a record's scene graph; None without a graph."""
    graph = graphs.get(str(row.get("imageId")))
    if graph is None:
        return None
    return sum(bool(value.get("name") == name) for value in graph.get("objects", {}).values())


def _nodes(program: object) -> list[Node]:
    """Steps with a scene-graph id, each id once, in order."""
    nodes: dict[str, Node] = {}
    for step in program if isinstance(program, list) else []:
        argument = str(step.get("argument", ""))
        match = re.search(r"\((\d+)\)", argument)
        if match:
            parts = [part.strip() for part in argument[: match.start()].split(",")]
            role = parts[2] if step.get("operation") != "select" and len(parts) > 2 else ""
            nodes.setdefault(match[1], Node(parts[0], match[1], role))
    return list(nodes.values())


def _boxes(row: Mapping[str, Any], nodes: list[Node], graphs: SceneGraphs) -> list[Box | None]:
    given = row.get("object_positions")
    if given is not None and not isinstance(given, list):
        raise RecordError("its 'object_positions' is not a list of boxes")
    if given:
        return [None if value is None else Box.of(value) for value in given]
    objects = graphs.get(str(row.get("imageId")), {}).get("objects", {})
    return [Box.of(objects[node.identity]) if node.identity in objects else None for node in nodes]


def _by_program(names: list[str], nodes: list[Node], question: str) -> list[str | None]:
    """The name of each node: by its words, else by its role in a relation of two, else the remaining name."""
    owners: list[str | None] = [node.words if node.words in names else None for node in nodes]
    left = [name for name in names if name not in owners]
    open_nodes = [place for place, owner in enumerate(owners) if owner is None]
    if len(left) == 1 and open_nodes:
        owners[open_nodes[0]] = left[0]
    elif len(left) == 2 and len(open_nodes) >= 2:
        subject, thing = sorted(left, key=lambda name: place_of(name, question))
        related_is_subject = nodes[open_nodes[1]].role == "s"
        owners[open_nodes[0]] = thing if related_is_subject else subject
        owners[open_nodes[1]] = subject if related_is_subject else thing
    return owners
