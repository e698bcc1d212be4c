"""Writes docs/reference/configuration.md from the schema that every config is checked against.

python tools/dev/config_reference.py            # writes the page
python tools/dev/config_reference.py --check    # exits with code 2 if the page is not up to date
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mom_tokenizers.errors import UserError, exit_clearly
from mom_train.config.run import RunConfig

OUT = Path(__file__).parents[2] / "docs/reference/configuration.md"
INTRODUCTION = """\
# Configuration

This page lists every key of the config of a run. The files `configs/*.yaml` set these keys, and so does the command
line (`key.subkey=value`). An unknown key, a wrong type or an impossible value is an error that says where it is and
what would be right.

A file may begin with `base: other.yaml`, a path relative to that file. Its mappings are then merged with those of the
base, and every other value replaces the one in the base. `RUN/config.yaml` holds the complete config that a run was
started with. `RUN` on this page stands for the `run_dir`.

`python tools/dev/config_reference.py` makes this page from `mom_train/config`; change the descriptions there.
"""
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


def section_of(kind: Mapping[str, Any]) -> str | None:
    """Name of the section that a key holds, either directly or in a list or mapping. None if it holds none."""
    for inner in (kind, *kind.get("anyOf", ())):
        if "$ref" in inner:
            return str(inner["$ref"]).rsplit("/", 1)[-1]
        for container in ("items", "additionalProperties"):
            if isinstance(inner.get(container), dict) and (found := section_of(inner[container])):
                return found
    return None


def words(kind: Mapping[str, Any]) -> str:
    """The type of a JSON schema in words for people."""
    if "anyOf" in kind:
        return ", or ".join(dict.fromkeys(words(inner) for inner in kind["anyOf"]))
    if "$ref" in kind:
        return "section"
    if "enum" in kind:
        return " | ".join(f"`{value}`" for value in kind["enum"])
    if "const" in kind:
        return f"`{kind['const']}`"
    if kind.get("type") == "array":
        if "prefixItems" in kind:
            return "list of " + ", ".join(words(inner) for inner in kind["prefixItems"])
        return f"list: {words(kind['items'])}"
    if kind.get("type") == "object":
        return f"mapping: name to {words(kind['additionalProperties'])}"
    if kind.get("format") == "path":
        return "path"
    name = _WORDS[kind["type"]]
    bounds = " and ".join(f"{sign} {kind[bound]:,.10g}" for bound, sign in _BOUNDS.items() if bound in kind)
    return f"{name} {bounds}".strip()


def default(key: Mapping[str, Any], required: bool) -> str:
    """The cell that says what value a key has if a config does not set it."""
    if required:
        return "**required**"
    value = key.get("default")
    if (isinstance(value, dict) and value) or (isinstance(value, list) and any(isinstance(v, dict) for v in value)):
        return "its defaults"
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip()}`"


def table(path: str, schema: Mapping[str, Any], sections: Mapping[str, Any], shown: dict[str, str]) -> Iterator[str]:
    """Lines of the page for one section: its keys, then the sections inside it.

    `shown` has the path of each section that is already on the page, so that none is described twice.
    """
    yield f"\n## `{path}`\n" if path else "\n## At the top\n"
    if path and (description := schema.get("description")):
        yield prose(description) + "\n"
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    inner = {}
    for name, key in schema["properties"].items():
        meaning = [prose(key["description"])] if "description" in key else []
        section = section_of(key)
        if section is not None:
            where = f"{path}.{name}".lstrip(".")
            if section not in shown:
                shown[section] = where
                inner[where] = sections[section]
            meaning.append(f"See [`{shown[section]}`](#{shown[section].replace('.', '')}).")
        kind = words(key).replace(" | ", " \\| ")
        cells = (f"`{name}`", kind, default(key, name in schema.get("required", ())), " ".join(meaning))
        yield "| " + " | ".join(cells) + " |"
    for where, section_schema in inner.items():
        yield from table(where, section_schema, sections, shown)


def prose(description: str) -> str:
    """A description as one line of Markdown, in which <name> is not taken for a tag."""
    return " ".join(description.split()).replace("<", "\\<")


def reference() -> str:
    """The whole page."""
    schema = RunConfig.model_json_schema()
    return INTRODUCTION + "\n".join(table("", schema, schema["$defs"], {})) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="(default: docs/reference/configuration.md)")
    arguments = parser.parse_args()
    with exit_clearly():
        text = reference()
        if not arguments.check:
            arguments.out.write_text(text)
        elif not arguments.out.exists() or arguments.out.read_text() != text:
            raise UserError(f"{arguments.out} is not what the schema says: run python tools/dev/config_reference.py")


if __name__ == "__main__":
    main()
