"""A griffe extension: doctests outside an "Examples:" section become code blocks of the API pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

_RUN = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_FLAG = re.compile(r"[ ]*# doctest:.*$", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fence every run of doctest lines; without it markdown reads ``>>>`` as three quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring as it is loaded."""
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            text = _FLAG.sub("", obj.docstring.value)
            obj.docstring.value = _RUN.sub(lambda run: f"```pycon\n{run.group()}\n```", text)
