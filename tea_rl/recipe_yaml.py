"""Reading and writing recipe YAML: safe tags only, no silent surprises, errors with line and column."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tea_rl.errors import TeaError

# YAML 1.2 reads 3e-4 as a number; PyYAML (YAML 1.1) would make it text. The shapes added here are only
# those that PyYAML leaves out: an exponent without a dot or without a sign.
_EXPONENT = re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """``SafeLoader`` that reads exponents as YAML 1.2 does and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f'the key "{key.value}" is written twice', key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """``SafeDumper`` whose text comes back as text through :class:`_Loader`, long text as readable blocks."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text.strip("\n") else None
    )


_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str, source: str) -> Any:
    """Parse one YAML document.

    Raises:
        TeaError: naming ``source``, line and column of the first mistake.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        # PyYAML splits some sentences in two: "expected a single document ...", "but found another".
        parts = (
            (error.context, error.problem) if (error.problem or "").startswith("but ") else (error.problem,)
        )
        problem = " ".join(" ".join(part or "" for part in parts).split())
        if "'\\t'" in problem:
            problem += " (indent with spaces, not tabs)"
        raise TeaError(f"{source}{where}: not valid YAML: {problem}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TeaError(f"{source}: not valid YAML: {' '.join(str(error).split())}.") from None


def dump_yaml(data: Any) -> str:
    """Write plain data so that :func:`parse_yaml` returns the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
