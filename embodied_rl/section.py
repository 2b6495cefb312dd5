"""The base class of every part of a recipe: strict, frozen, documented field by field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A part of a recipe. Unknown keys and wrong types are refused; nothing can be changed after loading.

    A `Config` never reads the disk, the environment or `sys.argv`. Ranges sit on the field
    (`Field(gt=0, le=1)`), relations between fields in one `model_validator` whose message has both values and a way
    out. The string under a field is its documentation (unit, and what a larger value does).
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_nested_defaults(cls, data: Any) -> Any:
        """Lay a partly given sub-section over that field's default, so a method keeps its own defaults.

        Without this, `loss: {kl_coef: 0.1}` under `type: grpo` would fall back to the generic loss for all else.
        """
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for name, info in cls.model_fields.items():
            default = info.get_default(call_default_factory=True) if not info.is_required() else None
            if isinstance(default, Section) and isinstance(data.get(name), dict):
                data[name] = _overlay(default.model_dump(), data[name])
        return data


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
