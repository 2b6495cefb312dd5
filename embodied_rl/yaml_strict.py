"""YAML as recipes use it: YAML 1.2 scalars, nothing silently lost, and every value knows its line.

What differs from PyYAML's own loader, and why:

    1e-4            a float (PyYAML: the string "1e-4")
    on, off, yes    strings (PyYAML: booleans)
    010             refused (PyYAML: 8; YAML 1.2: 10)
    12:30           a string (PyYAML: 750)
    .nan            refused: no setting is "not a number"
    a: 1, a: 2      refused with both lines (PyYAML: the last one wins)
    &x, *x, <<, !t  refused: `extends:` is the one way to compose
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.error import MarkedYAMLError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = {".nan", ".NaN", ".NAN"}


@dataclass(frozen=True)
class Node:
    """A value and where it was written; `value` is a scalar, a list of nodes, or a dict from key to node."""

    value: Any
    where: str
    """Ready for a message: `my.yaml:3`, or `command line: seed=1`."""

    def plain(self) -> Any:
        """The value without its places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


def merge(below: Node, top: Node) -> Node:
    """Lay one tree over another: mappings deeply, all else is replaced.

    A mapping whose `type` changes drops what is below it: those were the settings of something else.
    """
    if not (isinstance(below.value, dict) and isinstance(top.value, dict)):
        return top
    old, new = below.value.get("type"), top.value.get("type")
    if old and new and old.value != new.value:
        return top
    merged = dict(below.value)
    for key, node in top.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, top.where)


class YamlError(ValueError):
    """One or more problems in a YAML text: a complete line for each, and what could be read besides."""

    def __init__(self, problems: list[str], partial: Node | None = None) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
        self.partial = partial


def parse_scalar(text: str) -> Any:
    """Return the value of an unquoted YAML 1.2 (core schema) scalar.

    Args:
        text: For example `1e-4`, `true`, `null`, `hello`.

    Returns:
        value: None, bool, int, float or str.

    Raises:
        ValueError: `text` reads differently in YAML 1.1 and 1.2 (a leading zero), or is not a number (`.nan`).
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _LEADING_ZERO.fullmatch(text):
        raise ValueError(f"{text}: a leading zero is octal for some readers; write {int(text)}, or quote it for text")
    if _INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _INF.fullmatch(text):
        return float(match[1] + "inf")
    if text in _NAN:
        raise ValueError(f"{text}: no setting can be 'not a number'; write null or a number")
    return text


def parse(text: str, source: str, *, lines: bool = True) -> Node:
    """Read one YAML document.

    Args:
        text: The document.
        source: What to call it in messages, for example the file name.
        lines: Add the line to `source`; False for a value from the command line.

    Returns:
        root: Node of the document; an empty document is a node of None.

    Raises:
        YamlError: A syntax error (only the first is known), or every duplicate key, refused scalar and
            unsupported construct of the document.
    """

    def place(line: int) -> str:
        return f"{source}:{line}" if lines else source

    try:
        root = _Composer(text).get_single_node()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" {error.context}" if error.context else ""
        message = f"not valid YAML{context}: {error.problem}"
        raise YamlError([f"{place(mark.line + 1 if mark else 1)}: {message}"]) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError([f"{place(line)}: not valid YAML: character #x{error.character:04x} is not allowed"]) from None
    if root is None:
        return Node(None, place(1))
    problems: list[str] = []
    node = _convert(root, place, problems)
    if problems or node is None:
        raise YamlError(problems, node)
    return node


def dump(data: Any) -> str:
    """Write plain data as YAML that `parse` and YAML 1.1 readers read back to equal values, floats bit for bit."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=False)


class _Composer(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML up to the node graph, without any implicit type: scalars are read by `parse_scalar`."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        refused = ""
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
            refused = "anchors and aliases (&, *) are not used in recipes; use extends"
        elif getattr(event, "tag", None):
            refused = f"tags ({event.tag}) are not used in recipes"
        if refused:
            raise MarkedYAMLError(problem=refused, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _convert(node: Any, place: Any, problems: list[str]) -> Node | None:
    """The node's value; None, and a problem, for a scalar that is refused."""
    where = place(node.start_mark.line + 1)
    if isinstance(node, SequenceNode):
        items = [_convert(item, place, problems) for item in node.value]
        return Node([item for item in items if item is not None], where)
    if isinstance(node, MappingNode):
        return Node(_convert_mapping(node, place, problems), where)
    if node.style is not None:
        return Node(node.value, where)
    try:
        return Node(parse_scalar(node.value), where)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None


def _convert_mapping(node: MappingNode, place: Any, problems: list[str]) -> dict[str, Node]:
    entries: dict[str, Node] = {}
    for key_node, value_node in node.value:
        where = place(key_node.start_mark.line + 1)
        key = key_node.value
        if not isinstance(key_node, ScalarNode):
            problems.append(f"{where}: a key must be a name")
        elif key_node.style is None and _reads_as_other_type(key):
            problems.append(f"{where}: a key must be a name, got {key or 'nothing'}; quote it if it is meant")
        elif key == "<<" and key_node.style is None:
            problems.append(f"{where}: merge keys (<<) are not used in recipes; use extends")
        elif key in entries:
            problems.append(f"{where}: key '{key}' was given before at {entries[key].where}; keep one of them")
        elif (value := _convert(value_node, place, problems)) is not None:
            entries[key] = Node(value.value, where)
    return entries


def _reads_as_other_type(text: str) -> bool:
    try:
        return parse_scalar(text) != text
    except ValueError:
        return True


class _Dumper(yaml.SafeDumper):
    """Quotes every string that either YAML version would read as something else; short lists on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: _Dumper, text: str) -> Any:
    style = "'" if _reads_as_other_type(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _represent_list(dumper: _Dumper, items: list[Any]) -> Any:
    flow = not any(isinstance(item, (list, dict)) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(str, _represent_str)
_Dumper.add_representer(list, _represent_list)
