"""What MkDocs cannot do by itself: formulas without a script, the API's reference, and the list of decisions.

Run by `mkdocs build`; imports Graft, whose OpenAPI document the reference is made from.
"""

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from app.api.middleware import needed_scope
from app.main import create_app
from app.settings import Settings

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

JsonSchema = Mapping[str, Any]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    [decisions] = [entry["Decisions"] for entry in config.nav or [] if isinstance(entry, dict) and "Decisions" in entry]
    folder = Path(config.docs_dir) / "decisions"
    decisions += [f"decisions/{path.name}" for path in sorted(folder.glob("[0-9]*.md"))]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "reference.md", content="\n".join(reference(openapi()))))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show by themselves."""
    return FORMULA.sub(lambda found: mathml(html.unescape(found[2]), is_block=found[1] == "div"), content)


def mathml(formula: str, *, is_block: bool) -> str:
    return str(convert(formula.strip(), display="block" if is_block else "inline"))


def openapi() -> dict[str, Any]:
    return create_app(Settings(_env_file=None)).openapi()


def reference(document: Mapping[str, Any]) -> Iterator[str]:
    """A page of Markdown: every request by the noun it is about, then every body."""
    yield "# Every request\n"
    yield "Made from the server's own description, which it gives at `/openapi.json`; `/docs` of a running server lets"
    yield "you try each. How they are meant to be used: [The HTTP API](api.md).\n"
    by_tag: dict[str, list[tuple[str, str, JsonSchema]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation["tags"][0], []).append((method.upper(), path, operation))
    for tag, operations in by_tag.items():
        yield f"## {tag.capitalize()}\n"
        for method, path, operation in operations:
            yield from _operation(method, path, operation, document["components"]["responses"])
    yield "## Bodies\n"
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield from _schema(name, schema)


def _operation(method: str, path: str, operation: JsonSchema, shared: Mapping[str, JsonSchema]) -> Iterator[str]:
    """shared: answers that operations refer to, by their names."""
    yield f"### `{method} {path}`\n"
    scope = needed_scope(method, path)
    yield f"{operation['summary']}. Scope `{scope}`.\n"
    if operation.get("description"):
        yield f"{_escaped(operation['description'])}\n"
    parameters = operation.get("parameters", [])
    if parameters:
        yield "| parameter | in | type | |\n| --- | --- | --- | --- |"
        for each in parameters:
            yield _row(
                f"`{each['name']}`" + (" (required)" if each.get("required") and each["in"] != "path" else ""),
                each["in"],
                _type(each.get("schema", {})),
                _meaning(each.get("schema", {}) | {"description": each.get("description", "")}),
            )
        yield ""
    body = operation.get("requestBody")
    if body:
        kinds = [f"`{kind}`{_named(_type(content.get('schema', {})))}" for kind, content in body["content"].items()]
        yield f"Body: {', '.join(kinds)}. {_escaped(body.get('description', ''))}\n"
    yield "| answer | |\n| --- | --- |"
    for status, said in operation["responses"].items():
        answer = shared[said["$ref"].rpartition("/")[2]] if "$ref" in said else said
        kinds = [_type(content.get("schema", {})) for content in answer.get("content", {}).values()]
        yield _row(f"`{status}`", " ".join([_escaped(answer.get("description", "")), *dict.fromkeys(kinds)]))
    yield ""


def _schema(name: str, schema: JsonSchema) -> Iterator[str]:
    yield f"### {name}\n"
    if schema.get("description"):
        yield f"{_escaped(schema['description'])}\n"
    properties = schema.get("properties")
    if not properties:
        yield f"{_type(schema)}\n"
        return
    yield "| field | type | |\n| --- | --- | --- |"
    for field, described in properties.items():
        required = " (required)" if field in schema.get("required", []) and "default" not in described else ""
        yield _row(f"`{field}`{required}", _type(described), _meaning(described))
    yield ""


def _type(schema: JsonSchema) -> str:
    """A type in words, with a link where it is a body of its own."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_type(each) for each in schema[union]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    kind = schema.get("type", "")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _meaning(schema: JsonSchema) -> str:
    limits = [
        f"{word} {schema[name]}"
        for name, word in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "to"),
            ("exclusiveMaximum", "below"),
            ("maxLength", "up to this many characters:"),
            ("maxItems", "up to this many:"),
        )
        if name in schema
    ]
    default = "" if schema.get("default") is None else f"Default `{schema['default']}`."
    within = f"{' '.join(limits).capitalize()}." if limits else ""
    told = [_escaped(schema.get("description", "")), within, default]
    return " ".join(each for each in told if each)


def _named(kind: str) -> str:
    return f" ({kind})" if kind.startswith("[") else ""


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"


def _escaped(text: str) -> str:
    """Prose of the document as Markdown that shows it as it is, but for its code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<>\[\]*_])", r"\\\1", part) for part in parts)
