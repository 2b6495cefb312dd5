"""Write the generated pages of docs/: configuration.md from the Section classes, metrics.md from the metrics table.

`python scripts/generate_docs.py` rewrites what changed; with `--check` it only compares, and exits 1 if a page is old.
"""

from __future__ import annotations

import argparse
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from embodied_rl import registry
from embodied_rl.metrics import metrics_markdown
from embodied_rl.recipe import Recipe
from embodied_rl.schema import COMPONENTS, show
from embodied_rl.section import Section

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEAD = """\
# Configuration

Generated from the `Section` classes by `scripts/generate_docs.py`; do not edit.

A recipe is a YAML file. `extends:` names the files it is laid over (a name or a list; looked up beside the file, then
in the packaged `configs/`): sections merge deeply, lists are replaced, and a section whose `type` changes drops the
settings of the old type. On the command line `a.b=c` changes a setting, by the same YAML rules.
`embodied-rl show-config RECIPE` prints every value of a recipe and where it comes from.

Scalars are those of YAML 1.2: `1e-4` is a number, `on` and `yes` are text (write `true`), `12:30` is text. Refused,
because they would be lost or bent silently: a key given twice, numbers with a leading zero (`010`), `.nan`, anchors,
aliases and tags. Infinity is `.inf`, and `null` is written `null`.
"""
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


@dataclass(frozen=True)
class Row:
    """One setting."""

    takes: str
    default: str
    meaning: str


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    outdated = 0
    for name, text in {"configuration.md": configuration(), "metrics.md": metrics_markdown()}.items():
        path = DOCS / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        outdated += 1
        if check:
            print(f"docs/{name} is not current; run: python scripts/generate_docs.py")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    return 1 if check and outdated else 0


def configuration() -> str:
    """The page docs/configuration.md."""
    parts = [HEAD, "## Run", "Top-level keys and the sections of the run itself.", _table(_rows(Recipe), "default")]
    for kind in COMPONENTS:
        modules = {name: registry.load(kind, name) for name in registry.names(kind)}
        parts += [f"## {kind}: the sections by `type`"]
        if kind == "algorithm":  # the methods share their settings and differ in the defaults
            parts += ["\n".join(f"- `{name}`: {_first_line(module)}" for name, module in modules.items())]
            parts += [_methods_table({name: _rows(module.Config, f"{kind}.") for name, module in modules.items()})]
            continue
        for name, module in modules.items():
            parts += [f"### type: {name}", _first_line(module), _table(_rows(module.Config, f"{kind}."), "default")]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _first_line(module: types.ModuleType) -> str:
    return (module.__doc__ or "").strip().partition("\n")[0]


def _rows(section: type[Section], prefix: str = "", default: Section | None = None) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for name, field in section.model_fields.items():
        if name == "type" or (section is Recipe and name in COMPONENTS):
            continue
        value = getattr(default, name) if default is not None else _default(field)
        if isinstance(value, Section):
            rows |= _rows(type(value), f"{prefix}{name}.", value)
        else:
            takes = _kind(field.annotation) + _bounds(field)
            rows[f"{prefix}{name}"] = Row(takes, _value(value), field.description or "")
    return rows


_REQUIRED = object()


def _default(field: FieldInfo) -> Any:
    return _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def _value(value: Any) -> str:
    return "required" if value is _REQUIRED else f"`{show(value, limit=None)}`"


def _kind(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{show(a).strip(chr(39))}`" for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(a) for a in args)
    if origin is typing.Annotated:
        return _kind(args[0])
    if origin in (list, tuple):
        inner = [a for a in args if a is not Ellipsis]
        return f"list of {_kind(inner[0])}" if len(set(inner)) == 1 else f"list [{', '.join(map(_kind, inner))}]"
    if origin is dict:
        return f"map of {_kind(args[1])}"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`", Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(field: FieldInfo) -> str:
    found = [f", {sign} {getattr(m, name)}" for m in field.metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    return "".join(found)


def _table(rows: dict[str, Row], head: str) -> str:
    if not rows:
        return "No settings."
    lines = [f"| setting | takes | {head} | meaning |", "|---|---|---|---|"]
    lines += [f"| `{path}` | {_cell(r.takes)} | {_cell(r.default)} | {_cell(r.meaning)} |" for path, r in rows.items()]
    return "\n".join(lines)


def _methods_table(methods: dict[str, dict[str, Row]]) -> str:
    names = list(methods)
    merged: dict[str, Row] = {}
    for rows in methods.values():
        merged |= {path: row for path, row in rows.items() if path not in merged}
    lines = [f"| setting | takes | {' | '.join(names)} | meaning |", "|---|---|" + "---|" * (len(names) + 1)]
    for path, row in merged.items():
        values = [_cell(methods[name][path].default) if path in methods[name] else "–" for name in names]
        lines.append(f"| `{path}` | {_cell(row.takes)} | {' | '.join(values)} | {_cell(row.meaning)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main())
