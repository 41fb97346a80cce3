"""Lets `Example:` in a docstring be the section that `Examples:` is, so that its code is shown as code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r'(?m)^Example:$', 'Examples:', obj.docstring.value)
