"""For mkdocstrings: the docstrings' few marks of reStructuredText as Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

__all__ = ["Marks"]


class Marks(Extension):
    """A role such as ``:func:`x` `` becomes code, a literal block's two colons one, a simple table a code block."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            text = re.sub(
                r"^(=+ +=.*\n(?:.*\n)*?=+ +=.*\n(?:.*\n)*?=+ +=.*)$", r"```text\n\1\n```", text, flags=re.MULTILINE
            )
            obj.docstring.value = re.sub(r"::(?=\n\n)", ":", text)
