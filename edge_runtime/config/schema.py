"""JSON Schema of the device's configuration, for editors: ``python -m edge_runtime.config.schema`` prints it.

Made from `config.keys`, from which the reader is made too. Source: JSON Schema 2020-12
(https://json-schema.org/draft/2020-12/json-schema-core). Editors find it by the ``#:schema`` line at the top of a
TOML file (Taplo, Even Better TOML).
"""

import json
import sys
from typing import Any, Final

from edge_runtime.config.keys import AUTO, BASE_WHY, MAX_TEXT, NEEDS, SECTIONS, Key, Need, Section

TITLE: Final = "Configuration of skiffd"


def schema() -> dict[str, Any]:
    """The whole schema. Of a file with a ``base`` nothing is required, for the base may have it."""
    root = _table("The file of one device, or of a hardware class.")
    root["properties"]["base"] = {"type": "string", "description": BASE_WHY}
    tables = {"": root}
    for section in SECTIONS:
        parent, _, name = section.name.rpartition(".")
        table = tables[section.name] = _section(section)
        tables[parent]["properties"][name] = table
    required = {section.name: _required(section) for section in SECTIONS if _required(section)}
    whole = {
        "required": [section.name for section in SECTIONS if section.required],
        "properties": {name: {"required": keys} for name, keys in required.items()},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": TITLE,
        **root,
        "if": {"not": {"required": ["base"]}},
        "then": whole,
    }


def text() -> str:
    """The schema as it stands in its file."""
    return json.dumps(schema(), indent=2) + "\n"


def _required(section: Section) -> list[str]:
    return [key.name for key in section.keys if key.default is None]


def _table(why: str) -> dict[str, Any]:
    return {"type": "object", "description": why, "properties": {}, "additionalProperties": False}


def _section(section: Section) -> dict[str, Any]:
    table = _table(section.why)
    if section.free:
        return {**table, "additionalProperties": {"type": "string", "maxLength": MAX_TEXT}}
    table["properties"] = {key.name: _key(key) for key in section.keys}
    needs = [_need(need) for need in NEEDS if need.section == section.name]
    return {**table, "allOf": needs} if needs else table


def _need(need: Need) -> dict[str, Any]:
    when: dict[str, Any] = {"const": need.value} if need.value else {"minLength": 1}
    return {
        "if": {"properties": {need.key: when}, "required": [need.key]},
        "then": {"properties": {need.needed: {"minLength": 1}}, "required": [need.needed]},
    }


def _key(key: Key) -> dict[str, Any]:
    return {
        "description": key.why + (f" In {key.unit}." if key.unit else ""),
        **_type(key),
        **({} if key.default is None else {"default": key.default}),
    }


def _type(key: Key) -> dict[str, Any]:
    match key.kind:
        case "text" | "path" if key.choices:
            return {"enum": list(key.choices)}
        case "text" | "path" if key.pattern:
            return {"type": "string", "maxLength": MAX_TEXT, "pattern": f"^(?:{key.pattern})$"}
        case "text" | "path":
            return {"type": "string", "maxLength": MAX_TEXT}
        case "flag":
            return {"type": "boolean"}
        case "flag_or_auto":
            return {"enum": [AUTO, True, False]}
        case _:
            return {"type": key.kind, "minimum": key.low, "maximum": key.high}


if __name__ == "__main__":
    sys.stdout.write(text())
