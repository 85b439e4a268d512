"""The AsyncAPI document is today's, names everything that is sent, and describes the bytes that are."""

import copy
import inspect
import re

import msgpack
import pytest

from edge_runtime.contract import codec, topics
from edge_runtime.contract.codec import encode
from edge_runtime.contract.topics import Topics
from tests.golden import asyncapi, values

DOCUMENT = asyncapi.document()
SCHEMAS = DOCUMENT["components"]["schemas"]
KEYWORDS = {
    *(
        "$ref",
        "allOf",
        "type",
        "description",
        "title",
        "const",
        "enum",
        "pattern",
        "format",
        "minimum",
        "maximum",
    ),
    *("minLength", "maxLength", "items", "minItems", "maxItems", "additionalItems", "properties", "required"),
    *("additionalProperties", "maxProperties"),
}
KINDS = {"integer": int, "string": str, "boolean": bool, "array": list, "object": dict}


def resolve(schema):
    while "$ref" in schema:
        found = DOCUMENT
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema


def problems(value, schema, path="$"):
    """What of ``value`` breaks ``schema``: the keywords of JSON Schema that the document uses, and no other."""
    schema = resolve(schema)
    assert set(schema) <= KEYWORDS, path
    for part in schema.get("allOf", ()):
        yield from problems(value, part, path)
    if "const" in schema and (value != schema["const"] or isinstance(value, bool)):
        yield f"{path}: not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: not one of {schema['enum']}"
    if "type" in schema:
        kind = bytes if schema.get("format") == "binary" else KINDS[schema["type"]]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            yield f"{path}: {type(value).__name__} where {schema['type']} is due"
            return
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        yield f"{path}: {value} is out of range"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{path}: {value!r} does not match"
    if isinstance(value, str | bytes):
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            yield f"{path}: {len(value)} long"
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{path}: {len(value)} items"
        items = schema.get("items", [])
        each = items if isinstance(items, list) else [items] * len(value)
        for i, (item, part) in enumerate(zip(value, each, strict=False)):
            yield from problems(item, part, f"{path}[{part.get('title', i)}]")
    elif isinstance(value, dict):
        if not set(schema.get("required", ())) <= set(value):
            yield f"{path}: lacks {set(schema['required']) - set(value)}"
        if len(value) > schema.get("maxProperties", len(value)):
            yield f"{path}: too many keys"
        for key, item in value.items():
            part = schema.get("properties", {}).get(key, schema["additionalProperties"])
            if part is not True:
                yield from problems(item, part, f"{path}.{key}")


def test_the_document_is_todays():
    assert asyncapi.PAGE.read_text(encoding="utf-8") == asyncapi.text(), (
        "run: python -m tests.golden.asyncapi"
    )


@pytest.mark.parametrize("name", values.MESSAGES)
def test_what_is_sent_is_as_described(name):
    schema = SCHEMAS[type(values.MESSAGES[name]).__name__]
    envelope = msgpack.unpackb(encode(values.MESSAGES[name]))
    assert list(problems(envelope, schema)) == []
    body = schema["items"][-1]
    if isinstance(envelope[-1], list):
        assert len(envelope[-1]) == len(body["items"])
    else:
        assert list(envelope[-1]) == list(body["properties"])


def test_parts_are_described_whole():
    body = msgpack.unpackb(encode(values.MESSAGES["window-merged"]))[6]
    assert len(body[codec.WINDOW.index("latency")]) == len(SCHEMAS["Latency"]["items"])
    assert len(body[codec.WINDOW.index("health")]) == len(SCHEMAS["Health"]["items"])
    report = msgpack.unpackb(encode(values.MESSAGES["status-birth"]))[6]["models"][0]
    assert list(report) == list(SCHEMAS["ModelReport"]["properties"])


@pytest.mark.parametrize("name", values.MESSAGES)
def test_what_is_not_as_described_is_found(name):
    # The validator above is our own: it has to see a wrong type anywhere in the message.
    schema = SCHEMAS[type(values.MESSAGES[name]).__name__]
    envelope = msgpack.unpackb(encode(values.MESSAGES[name]))
    for at in range(len(envelope)):
        wrong = copy.copy(envelope)
        wrong[at] = 1.5
        assert list(problems(wrong, schema))
    assert list(problems(envelope[:-1], schema))
    body = envelope[-1]
    for key in range(len(body)) if isinstance(body, list) else list(body):
        wrong = copy.copy(body)
        wrong[key] = 1.5
        assert list(problems([*envelope[:-1], wrong], schema)), key


def test_every_kind_and_every_topic_is_there():
    assert set(asyncapi.TYPES) == set(codec.KINDS.values())
    found = {c.message for c in asyncapi.channels()}
    assert {what.__name__ for what in asyncapi.TYPES.values()} <= found
    public = {name for name, _ in inspect.getmembers(Topics, inspect.isfunction) if not name.startswith("_")}
    assert {c.name for c in asyncapi.channels()} == public - {"every", "sender", "source"}
    deliveries = [c.delivery for c in asyncapi.channels()]
    wanted = [value for value in vars(topics).values() if isinstance(value, topics.Delivery)]
    assert {id(delivery) for delivery in deliveries} == {id(delivery) for delivery in wanted}


def test_every_reference_leads_somewhere():
    def references(node):
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                yield from references(item)

    found = set(references(DOCUMENT))
    assert len(found) > 20
    for reference in found:
        assert resolve({"$ref": reference})


def test_each_channel_has_one_sender_and_one_receiver_and_names_its_parameters():
    for name, channel in DOCUMENT["channels"].items():
        assert set(channel["parameters"]) == set(re.findall(r"{(\w+)}", channel["address"]))
        actions = [
            operation["action"]
            for operation in DOCUMENT["operations"].values()
            if operation["channel"]["$ref"] == f"#/channels/{name}"
        ]
        assert sorted(actions) == ["receive", "send"]
