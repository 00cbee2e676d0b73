"""The commands and the plug-in of docs/evaluation.md are such as the command takes."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from videofactory.model.evaluate import app
from videofactory.model.evaluation.extractors import Extractor
from videofactory.model.evaluation.metrics import METRICS

from .evaluation_clips import clips, tensor

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parent.parent / "docs/evaluation.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```(?:sh|text)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "-m videofactory.model.evaluate" in line
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_taken(line: str) -> None:
    arguments = shlex.split(line.partition("-m videofactory.model.evaluate")[2])
    group = get_command(app)
    name = arguments.pop(0) if arguments[0] in group.commands else "score"
    assert group.commands[name].make_context(name, arguments).params


def test_every_metric_and_option_is_there() -> None:
    assert COMMANDS
    assert all(f"| `{name}` |" in PAGE for name in METRICS)


def test_the_plug_in() -> None:
    names: dict = {}
    exec(re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1], names)
    made = names["Colours"](weights=None, device="cpu")
    assert isinstance(made, Extractor) and made(tensor(clips(2))).shape == (2, 3)
