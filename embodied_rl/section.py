"""The base class of every part of a recipe: strict, frozen, documented field by field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationInfo, model_validator
from pydantic_core import CoreSchema


def _accept_lists(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "tuple" and "items_schema" in schema:
            schema["strict"] = False
        for value in schema.values():
            _accept_lists(value)
    elif isinstance(schema, list):
        for value in schema:
            _accept_lists(value)


class Section(BaseModel):
    """A part of a recipe. Unknown keys and wrong types are refused; nothing can be changed after loading.

    A `Config` never reads the disk, the environment or `sys.argv`. Ranges sit on the field
    (`Field(gt=0, le=1)`), relations between fields in one `model_validator` whose message has both values and a way
    out. The string under a field is its documentation (unit, and what a larger value does).
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let a YAML list fill a tuple field: a before-validator makes strict mode refuse it even for JSON input."""
        schema = handler(source)
        _accept_lists(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _fill_nested_defaults(cls, data: Any, info: ValidationInfo) -> Any:
        """Lay a partly given sub-section over that field's default, so a method keeps its own defaults.

        Without this, `loss: {kl_coef: 0.1}` under `type: grpo` would fall back to the generic loss for all else.
        """
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True) if not field.is_required() else None
            if isinstance(default, Section) and isinstance(data.get(name), dict):
                data[name] = _overlay(default.model_dump(mode=info.mode), data[name])
        return data


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
