"""The HTTP API described for programs.

Source: OpenAPI Specification 3.1.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cdcsync import __version__
from cdcsync.config.serving import Serve
from cdcsync.serve.messages import Answer, Document, EmbedRequest, Indexes, SearchRequest, Vectors
from cdcsync.target.ddl.filters import DESCRIBED

PROBLEM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "fix": {"type": "string"},
    },
    "required": ["title", "status", "detail", "fix"],
}


def describe(serve: Serve) -> dict[str, Any]:
    """Return the OpenAPI document."""
    types = (SearchRequest, Answer, Document, Indexes, EmbedRequest, Vectors)
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    request, answer, document, indexes, embed, vectors = schemas
    bounds = components["SearchRequest"]["properties"]
    bounds["k"] |= {"minimum": 1, "maximum": serve.max_k}
    bounds["skip"] |= {"minimum": 0, "maximum": 1_000}
    bounds["query"] |= {"maxLength": serve.max_query_characters}
    bounds["filter"] |= {"description": DESCRIBED}
    name = {"name": "index", "in": "path", "required": True, "schema": {"type": "string"}}
    key = {
        "name": "key",
        "in": "path",
        "required": True,
        "schema": {"type": "string"},
        "description": "The key's values, each percent-encoded, separated by commas.",
    }

    def operation(summary: str, answered: dict[str, Any], **more: Any) -> dict[str, Any]:
        content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        problems = {
            str(code): {"description": what, "content": content}
            for code, what in (
                (400, "Not JSON, or not of this form"),
                (401, "Not signed in"),
                (403, "Not allowed"),
                (404, "No such index or document"),
                (409, "The index has vectors of another model now: embed the query again"),
                (413, "Too large"),
                (415, "Compressed, or of another Content-Type than application/json"),
                (422, "The call cannot be answered; the problem says what to change"),
                (429, "Too many calls"),
                (503, "Away or busy"),
                (504, "The call took too long"),
            )
        }
        ok = {"description": "The answer", "content": {"application/json": {"schema": answered}}}
        return {"summary": summary, "responses": {"200": ok, **problems}, **more}

    def body(schema: dict[str, Any]) -> dict[str, Any]:
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    fetched = operation("Return a document", document, parameters=[name, key])
    fetched["responses"]["304"] = {"description": "Not changed since the ETag in If-None-Match"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "cdcsync", "version": __version__},
        "paths": {
            "/v1/indexes": {"get": operation("List the indexes", indexes)},
            "/v1/indexes/{index}/search": {
                "post": operation("Search an index", answer, parameters=[name], **body(request))
            },
            "/v1/indexes/{index}/documents/{key}": {"get": fetched},
            "/v1/embed": {"post": operation("Embed queries", vectors, **body(embed))},
        },
        "components": {
            "schemas": {**components, "Problem": PROBLEM},
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}] if serve.anonymous else [{"bearer": []}],
    }
