"""Plain words for a pydantic schema: what a field expects, what is wrong with a value, a reference table."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tea_rl.errors import TeaError, did_you_mean

ModelT = TypeVar("ModelT", bound=BaseModel)
Path = tuple[Any, ...]

_SIMPLE = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}
_PLURAL = {str: "texts", int: "whole numbers", float: "numbers", bool: "true/false values"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class SchemaProblem(TeaError):
    """One thing wrong with a mapping; ``path`` says where, so that a caller can say which source it came from."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(text)
        self.path = path


class SchemaRow(NamedTuple):
    """One line of the reference: dotted key, what it expects, default (``None`` when required) and meaning."""

    key: str
    type: str
    default: str | None
    description: str


def dotted(path: Path) -> str:
    """Join a path for display: ``("rewards", 0, "name")`` is ``rewards.0.name``."""
    return ".".join(str(part) for part in path)


def shown(value: Any, limit: int = 60) -> str:
    """Write a value as a reader would in YAML or JSON, cut to ``limit`` characters, always on one line."""
    if value is None:
        return "nothing (null)"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps(repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _bounds(metadata: Sequence[Any]) -> str:
    limits = [
        f"{word} {getattr(item, attribute):g}"
        for item in metadata
        for attribute, word in _BOUNDS.items()
        if getattr(item, attribute, None) is not None
    ]
    text = " and ".join(limits)
    return (" of " if text.startswith("at ") else " ") + text if text else ""


def _some(metadata: Sequence[Any]) -> str:
    return "non-empty " if any(getattr(item, "min_length", None) for item in metadata) else ""


def expectation(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Describe in words what a field takes.

    >>> expectation(list[str] | None)
    'a list of texts or null'
    >>> expectation(Literal["a", "b"])
    'one of a, b'
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return expectation(args[0], [*args[1:], *metadata])
    if origin in (Union, types.UnionType):
        kinds = [
            expectation(kind, metadata if index == 0 else ())
            for index, kind in enumerate(args)
            if kind is not type(None)
        ]
        return " or ".join(kinds) + (" or null" if type(None) in args else "")
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else json.dumps(args[0])
    if origin is list:
        return f"a {_some(metadata)}list of {_PLURAL.get(args[0], 'mappings')}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping of settings"
    if annotation is str:
        return _some(metadata) + "text"
    return _SIMPLE.get(origin or annotation, "a value") + _bounds(metadata)


def _child_model(annotation: Any) -> type[BaseModel] | None:
    """The model inside a field (``Group`` or ``list[Group]``), if there is one."""
    candidates = get_args(annotation) if get_origin(annotation) is list else (annotation,)
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def field_at(model: type[BaseModel], path: Path) -> tuple[Path, FieldInfo | None, type[BaseModel]]:
    """Follow ``path`` into the schema.

    Returns the part of the path that the schema knows (list positions kept, pydantic's union labels cut), the field
    there (``None`` when the path names no field) and the model that holds it.
    """
    known: Path = ()
    owner, field = model, None
    for position, part in enumerate(path):
        if isinstance(part, int) and field is not None and get_origin(field.annotation) is not dict:
            if get_origin(field.annotation) is None and _child_model(field.annotation) is not None:
                return (*known, part), None, field.annotation  # type: ignore[return-value]  # a number as a key
            known += (part,)
            continue
        child = owner if field is None else _child_model(field.annotation)
        if child is None:
            break
        if part not in child.model_fields:
            return (*known, part), None, child
        owner, field, known = child, child.model_fields[part], path[: position + 1]
    return known, field, owner


def _unknown_key(root: type[BaseModel], path: Path, owner: type[BaseModel]) -> str:
    key = str(path[-1])
    text = f'unknown key "{dotted(path)}".'
    if key not in owner.model_fields:
        hint = did_you_mean(key, owner.model_fields)
        homes = [
            name
            for name, field in root.model_fields.items()
            if key in getattr(_child_model(field.annotation), "model_fields", {})
        ]
        if not hint and homes:
            hint = f' It belongs under "{homes[0]}" ({homes[0]}.{key}).'
        return text + (hint or f" Keys here: {', '.join(owner.model_fields)}.")
    return text


def _mend(field: FieldInfo, value: Any, is_item: bool) -> str:
    """What to write instead, where the slip is plain."""
    annotation = field.annotation
    child = _child_model(annotation)
    if child is not None and (is_item or get_origin(annotation) is None):
        first, first_field = next(iter(child.model_fields.items()))
        if isinstance(value, str) and first_field.is_required():
            return f"; write {{{first}: {value}}}"
        return (
            "; indent its settings below it, or delete the line"
            if value is None
            else '; write "key: value" lines'
        )
    if get_origin(annotation) is list and not is_item:
        if field.examples:
            return f"; for example {field.examples[0]}"
        return f"; write it as a list: [{shown(value)}]" if isinstance(value, (str, int, float)) else ""
    takes_text = str in (annotation, *get_args(annotation))
    single = isinstance(value, (bool, int, float))
    if takes_text and (single or isinstance(value, list) and list[str] in get_args(annotation)):
        return f"; put {'it' if single else 'every entry'} in quotes to make it text"
    return ""


def _describe(root: type[BaseModel], error: Mapping[str, Any]) -> SchemaProblem:
    """Turn one pydantic error into one line."""
    path, field, owner = field_at(root, tuple(error["loc"]))
    kind, value = error["type"], error["input"]
    if kind in ("extra_forbidden", "invalid_key") or (error["loc"] and field is None):
        return SchemaProblem(path, _unknown_key(root, path, owner))
    if field is None:
        return SchemaProblem((), f'expected a mapping of settings ("key: value" lines); got {shown(value)}.')
    key = dotted(path)
    wanted = expectation(field.annotation, field.metadata)
    if kind == "missing":
        example = f", for example {field.examples[0]}" if field.examples else ""
        return SchemaProblem(path, f"{key} is missing: expected {wanted}{example}.")
    if kind == "value_error":
        return SchemaProblem(path, f"{key} {error['msg'].removeprefix('Value error, ')}; got {shown(value)}.")
    if kind == "string_pattern_mismatch":
        return SchemaProblem(
            path, f"{key}: expected letters, digits, '.', '_' and '-' only; got {shown(value)}."
        )
    is_item = isinstance(path[-1], int)
    if is_item and get_origin(field.annotation) is list:
        wanted = expectation(get_args(field.annotation)[0])
    hint = ""
    if get_origin(field.annotation) is Literal and isinstance(value, str):
        hint = did_you_mean(value, map(str, get_args(field.annotation)))
    return SchemaProblem(
        path, f"{key}: expected {wanted}; got {shown(value)}{_mend(field, value, is_item)}.{hint}"
    )


def _numbers_given_as_booleans(model: type[BaseModel], data: Any, path: Path = ()) -> Iterator[SchemaProblem]:
    """Pydantic reads ``true`` as 1 where a number is expected; in a recipe that is a slip, so refuse it."""
    if not isinstance(data, Mapping):
        return
    for name, field in model.model_fields.items():
        if name not in data:
            continue
        value, here, child = data[name], (*path, name), _child_model(field.annotation)
        items = list(enumerate(value)) if isinstance(value, list) else []
        if child is not None:
            yield from _numbers_given_as_booleans(child, value, here)
            for index, item in items:
                yield from _numbers_given_as_booleans(child, item, (*here, index))
            continue
        kinds = get_args(field.annotation) or (field.annotation,)
        if bool in kinds or not ({int, float} & set(kinds)):
            continue
        if isinstance(value, bool) or any(isinstance(item, bool) for _, item in items):
            wanted = expectation(field.annotation, field.metadata)
            yield SchemaProblem(here, f"{dotted(here)}: expected {wanted}; got {shown(value)}.")


def validate(model: type[ModelT], data: Any) -> ModelT:
    """Check ``data`` against ``model``.

    Raises:
        SchemaProblem: for the first thing wrong; a misspelt key comes before the missing one it probably stands for.
    """
    problems = list(_numbers_given_as_booleans(model, data))
    try:
        result = model.model_validate(data)
    except ValidationError as error:
        order = {"extra_forbidden": 0, "invalid_key": 0, "missing": 2}
        details = sorted(error.errors(include_url=False), key=lambda item: order.get(item["type"], 1))
        found = [_describe(model, item) for item in details]
        problems = found[:1] + problems if order.get(details[0]["type"]) == 0 else problems + found
        others = len({problem.path for problem in problems} - {problems[0].path})
        more = f" ({others} more after this one.)" if others else ""
        raise SchemaProblem(problems[0].path, str(problems[0]) + more) from None
    if problems:
        raise problems[0]
    return result


def _default_text(field: FieldInfo) -> str | None:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return None
    return "null" if default is None else shown(default, limit=200)


def schema_rows(model: type[BaseModel], prefix: Path = ()) -> list[SchemaRow]:
    """List every leaf of the schema in the order in which it is written."""
    rows: list[SchemaRow] = []
    for name, field in model.model_fields.items():
        child = _child_model(field.annotation)
        if child is None:
            wanted = expectation(field.annotation, field.metadata)
            rows.append(
                SchemaRow(dotted((*prefix, name)), wanted, _default_text(field), field.description or "")
            )
        else:
            marker = ("[]",) if get_origin(field.annotation) is list else ()
            rows += schema_rows(child, (*prefix, name + "".join(marker)))
    return rows


def _group_description(model: type[BaseModel], group: str) -> str | None:
    """What the schema says of a group, ``head.context`` as well as ``head``."""
    *parents, name = group.removesuffix("[]").split(".")
    for parent in parents:
        child = _child_model(model.model_fields[parent].annotation)
        assert child is not None  # only groups have keys below them
        model = child
    return model.model_fields[name].description


def markdown_tables(model: type[BaseModel]) -> str:
    """Write the schema as Markdown: one table for the settings outside any group, then one a group."""
    groups: dict[str, list[SchemaRow]] = {}
    for row in schema_rows(model):
        group, _, key = row.key.rpartition(".")
        groups.setdefault(group, []).append(row._replace(key=key))
    parts: list[str] = []
    for group, rows in groups.items():
        note = _group_description(model, group) if group else "Outside the groups."
        listed = " A list; each entry has these keys." if group.endswith("[]") else ""
        title = f"`{group.removesuffix('[]')}`" if group else "Top level"
        parts += ["", f"### {title}", "", f"{note}{listed}", ""]
        parts += ["| key | expects | default | meaning |", "|---|---|---|---|"]
        for row in rows:
            default = "required" if row.default is None else f"`{row.default}`"
            cells = (f"`{row.key}`", row.type, default, row.description)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts).strip() + "\n"
