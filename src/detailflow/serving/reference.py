"""The page at /docs: the API's own description as plain HTML, with nothing from other hosts."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; font-family: ui-monospace, monospace; font-size: 1.1rem; }
pre { padding: .75rem; overflow-x: auto; border: 1px solid; border-radius: .3rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid; }
"""


def reference_page(schema: Mapping[str, Any], model: str, has_classes: bool, wants_key: bool) -> str:
    """Return the page for an OpenAPI description."""
    example = json.dumps(({"prompt": "0"} if has_classes else {}) | {"n": 2, "seed": 1})
    key = "-H 'Authorization: Bearer KEY' " if wants_key else ""
    parts = [
        f"<p>{escape(schema['info']['description'])} The model here is <code>{escape(model)}</code>. The same as data: "
        '<a href="openapi.json">openapi.json</a>.</p>',
        f"<pre>curl {key}-H 'Content-Type: application/json' -d '{escape(example)}' "
        "http://HOST:PORT/v1/images/generations</pre>",
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts += _operation(schema, f"{method.upper()} {path}", operation)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>DetailFlow API</title><style>{_STYLE}</style></head><body><h1>DetailFlow API</h1>"
        f"{''.join(parts)}</body></html>"
    )


def _operation(schema: Mapping[str, Any], title: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2>{escape(title)}</h2>"
    yield "".join(f"<p>{_code(text)}</p>" for text in operation.get("description", "").split("\n\n") if text)
    rows = [(p["name"], p.get("required", False), p["schema"], p) for p in operation.get("parameters", ())]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        rows += list(_fields(schema, content["schema"]))
    if rows:
        yield "<div><table><tr><th>Parameter</th><th>Type</th><th>Default</th><th></th></tr>"
        for name, required, field, described in rows:
            default = "required" if required else json.dumps(field.get("default"))
            cells = (f"<code>{escape(name)}</code>", escape(_type(field)), escape(default))
            text = _code(described.get("description", field.get("description", "")))
            yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}<td>{text}</td></tr>"
        yield "</table></div>"
    yield "<div><table><tr><th>Status</th><th>Answer</th></tr>"
    for status, response in operation["responses"].items():
        names = [_type(content.get("schema", {})) for content in response.get("content", {}).values()]
        kinds = escape(", ".join(filter(None, names)))
        text = _code(response["description"]).rstrip(".") + (f": {kinds}" if kinds else "")
        yield f"<tr><td>{status}</td><td>{text}</td></tr>"
    yield "</table></div>"


def _fields(schema: Mapping[str, Any], body: Mapping[str, Any]) -> Iterator[tuple[str, bool, Any, Any]]:
    for reference in (body, *body.get("allOf", ())):
        if "$ref" in reference:
            found = schema["components"]["schemas"][reference["$ref"].rpartition("/")[2]]
            for name, field in found["properties"].items():
                yield name, name in found.get("required", ()), field, field


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(kind for part in field["anyOf"] if (kind := _type(part)) != "null")
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "const" in field or "enum" in field:
        return ", ".join(map(json.dumps, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    return str(field.get("type", ""))


def _code(text: str) -> str:
    """Escape text, with `code` marked."""
    parts = escape(" ".join(text.split())).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
