"""Whether the names and notes of a file are text: protobuf hands on what is no UTF-8 as bytes, which nobody expects."""

from __future__ import annotations

from typing import Any

import onnx

from qcompiler.errors import ModelError

SHOWN = 40  # bytes


def check_texts(message: Any, file: object) -> None:
    """Raise ModelError where a string of a message, or of one within it, is no UTF-8. No weights are read."""
    if isinstance(message, onnx.TensorProto):
        for text in (message.name, message.doc_string):
            _check(text, file)
        for entry in (*message.external_data, *message.metadata_props):
            check_texts(entry, file)
        return
    for field, value in message.ListFields():
        repeated = not isinstance(value, str | bytes) and hasattr(value, "__len__")
        if field.type == field.TYPE_STRING:
            for text in value if repeated else (value,):
                _check(text, file)
        elif field.type == field.TYPE_MESSAGE:
            for inner in value if repeated else (value,):
                check_texts(inner, file)


def _check(text: object, file: object) -> None:
    if not isinstance(text, str):
        raise ModelError(f"{file} holds a name or note that is no UTF-8 ({text[:SHOWN]!r}); export it again")  # type: ignore[index]
