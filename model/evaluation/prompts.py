"""Texts for samples: a text file with one a line, a table with a column of them, or JSON lines."""

from __future__ import annotations

import csv
import json
from difflib import get_close_matches
from pathlib import Path

COLUMNS = ("prompt", "caption", "text", "sentence", "name")
"""Where texts are looked for when no column is named; `name` is WebVid's."""


def read_prompts(file: Path, column: str | None = None) -> list[str]:
    """The prompts of a file, in its order, empty ones left out.

    Args:
        file: `.csv` or `.tsv` with a header, `.jsonl` with an object (or a string) a line, else a prompt a line.
        column: of a table or of JSON lines; by default the first of `COLUMNS` that is there.

    Raises:
        ValueError: the file is no such file, holds no prompt, or has no such column; the message has those it has.
        OSError: it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    kind = file.suffix.lower()
    if kind in (".csv", ".tsv"):
        found = _table(text, file, column, "\t" if kind == ".tsv" else ",")
    elif kind == ".jsonl":
        found = _lines_of_json(text, file, column)
    else:
        if column is not None:
            raise ValueError(
                f"{file} is read as a prompt a line and has no columns; leave out --column, or name a .csv or .jsonl"
            )
        found = text.splitlines()
    prompts = [prompt.strip() for prompt in found if prompt.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    return prompts


def _table(text: str, file: Path, column: str | None, delimiter: str) -> list[str]:
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
    try:
        name = _column(list(rows.fieldnames or []), file, column)
        return [row[name] or "" for row in rows]
    except csv.Error as error:
        raise ValueError(f"{file} is no table: {error} in line {rows.line_num}") from error


def _lines_of_json(text: str, file: Path, column: str | None) -> list[str]:
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file} is no JSON in line {number}: {error}") from error
        value = row if isinstance(row, str) else row[_column(list(row), file, column)] if isinstance(row, dict) else None
        if not isinstance(value, str):
            raise ValueError(f"{file} holds no text in line {number}: {line[:60]}")
        prompts.append(value)
    return prompts


def _column(there: list[str], file: Path, column: str | None) -> str:
    wanted = COLUMNS if column is None else (column,)
    found = next((name for name in wanted if name in there), None)
    if found is None:
        nearest = get_close_matches(column or "", there, 1)
        hint = f"; is {nearest[0]} meant?" if nearest else "; name one with --column"
        raise ValueError(f"{file} has no column {' or '.join(wanted)}, it has {', '.join(map(str, there)) or 'none'}{hint}")
    return found
