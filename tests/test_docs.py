"""The documents say what is: generated pages are fresh, commands, links and tests that they name exist, and their snippets run."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.main import get_command

from videofactory.curation.caption import load_captioner
from videofactory.curation.guard import ERRORS
from videofactory.curation.signals import Frame, Signal
from videofactory.model.training.config import load_config
from videofactory.pipelines import reference
from videofactory.pipelines.cli import app
from videofactory.pipelines.recipe import Recipe, changed_content, load_recipe
from videofactory.shards import verify
from videofactory.shards.schema import CORE_CLIP_FIELDS, source_schema

from .test_build import run
from .videos import make_folder

ROOT = Path(__file__).parent.parent
GENERATED = sorted(reference.pages(ROOT / "docs"))
DOCUMENTS = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")})
OTHER_PROGRAMS = {"git", "cd", "pip"}


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def all_blocks(language: str) -> list[Any]:
    found = [(path, number, block) for path in DOCUMENTS for number, block in enumerate(blocks(path, language))]
    return [pytest.param(block, id=f"{names(path)}-{number}") for path, number, block in found]


class TestGenerated:
    @pytest.mark.parametrize("page", GENERATED, ids=names)
    def test_is_what_the_code_says(self, page: Path) -> None:
        fresh = reference.pages(ROOT / "docs")[page]
        assert page.read_text(encoding="utf-8") == fresh, f"{names(page)} is out of date; run `{reference.COMMAND}`"

    def test_holds_every_setting(self) -> None:
        full = Recipe.model_validate({"embed": {"model": "x"}, "caption": {}}).model_dump()
        keys = {
            key for name, value in full.items() for key in ([f"{name}.{k}" for k in value] if isinstance(value, dict) else [name])
        }
        described = {setting.key: setting for section in reference.sections() for setting in section.settings}
        assert keys - {"rules"} <= set(described)
        assert all(setting.meaning for setting in described.values())

    @pytest.mark.parametrize("setting", [s for group in reference.sections() for s in group.settings], ids=lambda s: s.key)
    def test_fixed_is_what_a_build_refuses_to_change(self, setting: reference.Setting) -> None:
        base = {"embed": {"model": "x"}, "caption": {"options": {}}}
        stored = Recipe.model_validate(base)
        changed = next(recipe for recipe in variants(base, setting.key.split(".")) if recipe != stored)
        assert bool(changed_content(stored, changed)) == setting.fixed

    def test_lost_marks_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="put them back"):
            reference.with_errors("# A page without marks")


def variants(base: dict[str, Any], keys: list[str]) -> Iterator[Recipe]:
    """Recipes with one key changed to whatever value it takes."""
    for value in (1, 2, 64, 0.5, "copy", "none", "text", "slow", True, False, {"name": "true"}, 1 << 28, 1 << 30):
        changed = yaml.safe_load(yaml.safe_dump(base))
        inner = changed
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
        try:
            yield Recipe.model_validate(changed)
        except ValueError:
            continue


class TestCommands:
    command = get_command(app)
    modules = {  # noqa: RUF012
        f"videofactory.model.{name}": get_command(importlib.import_module(f"videofactory.model.{name}").app)
        for name in ("generate", "evaluate", "train", "precompute", "ablate")
    }

    def check(self, line: str) -> None:
        """That `line` is a command of ours which its parser takes, a target of the Makefile, or a module that exists."""
        program, *arguments = shlex.split(line, comments=True)
        program = Path(program).name
        if program == "videofactory":
            self.check_command_line(arguments)
        elif program == "make":
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for argument in arguments:
                name, is_setting, _ = argument.partition("=")
                known = rf"\$\({name}\)" if is_setting else rf"^{name}:"
                assert re.search(known, makefile, re.MULTILINE), f"the Makefile knows no {argument!r} ({line})"
        elif program in ("python", "python3") and arguments[:1] == ["-m"]:
            assert importlib.util.find_spec(arguments[1]), line
            if module := self.modules.get(arguments[1]):
                self.check_module(module, arguments[2:])
        elif program == "pre-commit":
            assert arguments == ["install"] and (ROOT / ".pre-commit-config.yaml").exists()
        else:
            assert program in OTHER_PROGRAMS, f"unknown program {program!r} ({line})"

    def check_module(self, command: Any, arguments: list[str]) -> None:
        if hasattr(command, "commands"):
            name = arguments.pop(0) if arguments[:1] and arguments[0] in command.commands else "score"
            command = command.commands[name]
        command.make_context("module", arguments)

    def check_command_line(self, arguments: list[str]) -> None:
        if not arguments or arguments[0].startswith("-"):
            return
        context = self.command.make_context("videofactory", list(arguments), resilient_parsing=True)
        subcommand = self.command.get_command(context, arguments[0])  # type: ignore[attr-defined]
        assert subcommand, f"there is no command {arguments[0]!r}"
        parsed = subcommand.make_context(arguments[0], list(arguments[1:]))
        if settings := parsed.params.get("settings"):
            load_recipe("hdvg", settings)

    @pytest.mark.parametrize("block", all_blocks("sh"))
    def test_shell_blocks(self, block: str) -> None:
        for line in block.replace("\\\n", " ").splitlines():
            self.check(line)

    @pytest.mark.parametrize("path", DOCUMENTS, ids=names)
    def test_inline_commands(self, path: Path) -> None:
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", prose):
            words = code.split()
            if words[0] == "videofactory" and len(words) > 1 and not words[1].startswith("-"):
                context = self.command.make_context("videofactory", words[1:], resilient_parsing=True)
                subcommand = self.command.get_command(context, words[1])  # type: ignore[attr-defined]
                assert subcommand, code
                self.check_options(words[2:], {option for parameter in subcommand.params for option in parameter.opts})
            elif (words[0] == "make" and len(words) > 1) or words[0] == "python":
                self.check(code)
            elif words[0].startswith("--"):
                self.check_options(words[:1], self.known_options())

    def known_options(self) -> set[str]:
        groups = [self.command, *self.modules.values()]
        commands = [inner for group in groups for inner in (group.commands.values() if hasattr(group, "commands") else [group])]
        return {
            option
            for command in commands
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }

    def check_options(self, words: list[str], known: set[str]) -> None:
        assert {word for word in words if word.startswith("--")} <= known

    def test_every_command_is_described(self) -> None:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        for name, command in self.command.commands.items():  # type: ignore[attr-defined]
            assert command.hidden or f"| `videofactory {name}` |" in readme, name

    @pytest.mark.parametrize(
        "line",
        [
            "videofactory buidl --out x",
            "videofactory build --no-such-option",
            "videofactory build --set clips.crff=3",
            "make no-such-target",
            "make build-dataset NO_SUCH=1",
            "python -m videofactory.nothing",
            "python -m videofactory.model.generate x --no-such-option",
            "python -m videofactory.model.evaluate sample --no-such-option",
            "python -m videofactory.model.train",
            "rm -rf x",
        ],
    )
    def test_what_does_not_exist_is_found(self, line: str) -> None:
        with pytest.raises(Exception):  # noqa: B017 - whatever it is, it is noticed
            self.check(line)


def anchors(path: Path) -> set[str]:
    """What a page's headings are called in links, as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def test_named_files_and_tests_exist() -> None:
    for path in DOCUMENTS:
        for file, test in re.findall(
            r"`((?:curation|shards|pipelines|model|tests)/[\w/]+\.py)(?:::(\w+))?`", path.read_text(encoding="utf-8")
        ):
            assert (ROOT / file).exists(), f"{names(path)} names {file}"
            assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{names(path)} names {file}::{test}"
    layout = next(block for block in blocks(ROOT / "docs/architecture.md", "") if block.startswith("curation/"))
    folder = ""
    for line in layout.splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") else folder
        assert (ROOT / folder / (name if line.startswith(" ") else "")).exists(), line


class TestDatasetPage:
    page = (ROOT / "docs/dataset.md").read_text(encoding="utf-8")

    def table(self, name: str) -> list[tuple[str, str]]:
        section = self.page.partition(f"## The table `{name}`")[2].partition("\n## ")[0]
        rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
        return [(row[0], row[1]) for row in rows[2:]]

    def test_columns_of_clips(self) -> None:
        documented = [row for row in self.table("clips") if row[0] != "signals"]
        assert documented == [(field.name, str(field.type)) for field in CORE_CLIP_FIELDS]

    def test_columns_of_sources(self) -> None:
        expected = [(field.name, str(field.type).partition("<")[0]) for field in source_schema([])]
        assert self.table("sources") == expected

    def test_every_promise_of_verify(self) -> None:
        listed = set(re.findall(r"^- (.+)$", self.page.partition("## What `verify` checks")[2], re.MULTILINE))
        assert listed == set(promises()) | set(verify._LAWS)

    def test_every_error_class(self) -> None:
        assert all(f"| `{name}` |" in self.page for name in ERRORS)


def promises() -> Iterator[str]:
    """The promises that `verify` names beside its laws in SQL: of each triple it makes, the part that is a sentence."""
    for node in ast.walk(ast.parse(inspect.getsource(verify))):
        if isinstance(node, ast.Tuple) and len(node.elts) == 3:
            for part in node.elts[:2]:
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value:
                    yield part.value


def test_the_readme_lists_the_rules_of_hdvg() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("| rule |")[2].partition("\n\n")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| `(.+)` \|$", section, re.MULTILINE)) == load_recipe("hdvg").rules


@pytest.mark.parametrize("block", all_blocks("yaml"))
def test_recipes_in_the_documents_load(block: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(block, encoding="utf-8")
    if "steps" in yaml.safe_load(block):
        assert load_config(file).data.buckets  # of training
    else:
        assert load_recipe(str(file)).rules


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small dataset where the snippets expect one."""
    folder = tmp_path_factory.mktemp("snippets")
    run(make_folder(folder / "videos", 3), folder / "data/sample")
    return folder


class TestSnippets:
    @pytest.mark.parametrize("block", [block for block in all_blocks("python") if "data/sample" in block.values[0]])
    def test_on_a_dataset(self, block: str, folder: Path) -> None:
        done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        if "DataLoader" in block:
            assert "(4, 16, 3, 192, 344)" in done.stdout
        else:
            assert re.search(r"\d", done.stdout)

    def test_the_signal(self) -> None:
        names: dict[str, Any] = {"__name__": "an_example"}
        exec(next(b for b in blocks(ROOT / "docs/architecture.md", "python") if "(Signal)" in b), names)
        signal = next(v for v in names.values() if isinstance(v, type) and issubclass(v, Signal) and v is not Signal)()
        for colour, expected in (((0, 0, 255), 1.0), ((90, 90, 90), 0.0)):
            frame = Frame(0.0, np.full((9, 16, 3), colour, np.uint8))
            measured = np.array([signal.measure(frame, None)])
            (column,) = signal.columns
            assert signal.summarise(np.zeros(1), measured) == {column.name: pytest.approx(expected)}

    def test_the_captioner(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from PIL import Image

        page = ROOT / "docs/architecture.md"
        (tmp_path / "my_captioner.py").write_text(next(b for b in blocks(page, "python") if "my_captioner.py" in b))
        monkeypatch.syspath_prepend(tmp_path)
        settings = yaml.safe_load(next(b for b in blocks(page, "yaml") if "my_captioner" in b))["caption"]
        captioner = load_captioner(settings["captioner"], **settings["options"])
        white, black = Image.new("RGB", (64, 36), "white"), Image.new("RGB", (64, 36))
        assert captioner.caption([white, black]) == ["a bright picture", "a dark picture"]
