"""Recipes: what may be written, what may change, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from videofactory.curation.rules import Rules
from videofactory.curation.signals import columns
from videofactory.pipelines.recipe import RECIPES, RecipeError, changed_content, dump_recipe, load_recipe, parse_recipe


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_load_and_their_rules_parse(name: str) -> None:
    recipe = load_recipe(name)
    assert [rule.name for rule in Rules(recipe.rules, columns(), recipe.steps)] == list(recipe.rules)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "dump") == recipe


def test_settings_change_single_keys() -> None:
    recipe = load_recipe(
        "hdvg", ["clips.crf=23", "caption=null", "rules.still=null", "rules.short=duration < 20", "execution.cpus=3"]
    )
    assert recipe.clips.crf == 23 and recipe.caption is None and recipe.execution.cpus == 3
    assert "still" not in recipe.rules and recipe.rules["short"] == "duration < 20"
    assert recipe.rules["resolution"] == load_recipe("hdvg").rules["resolution"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["clip.crf=3"], "unknown key 'clip'; did you mean 'clips'"),
        (["clips.crv=3"], r"unknown key 'clips\.crv'; did you mean 'crf'"),
        (["execution.shard_byte=3"], "did you mean 'shard_bytes'"),
        (["clips.crf=90"], r"crf is 90; it must lie between 0 and 51"),
        (["analysis.width=2"], "width 2 is outside"),
        (["analysis.window=0"], r"window is 0; it must lie between 1 and 100"),
        (["analysis.adaptive_threshold=.nan"], "adaptive_threshold is nan"),
        (["clips.preset=nonsense"], "x264 has ultrafast"),
        (["split.val=0.8", "split.test=0.8"], "more than everything"),
        (["execution.cpus=0"], r"execution\.cpus.*greater than or equal to 1.*it is 0"),
        (["caption"], "not of the form key=value"),
        (["caption=[1"], "is no YAML"),
    ],
)
def test_wrong_settings_are_named(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("hdvg", settings)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'hdgv'.*did you mean 'hdvg'"):
        load_recipe("hdgv")
    path = tmp_path / "a.yaml"
    path.write_text("extends: a.yaml\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(str(path))
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="must be a mapping"):
        load_recipe(str(path))
    path.write_text("!!python/object/apply:os.system ['true']\n")
    with pytest.raises(RecipeError, match="is no YAML"):
        load_recipe(str(path))


def test_a_file_extends_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: hdvg\nname: mine\nrules:\n  still: null\n  long: duration >= 3\n")
    recipe = load_recipe(str(path))
    assert recipe.name == "mine" and recipe.rules["long"] == "duration >= 3" and "still" not in recipe.rules
    assert recipe.rules["widescreen"] == load_recipe("hdvg").rules["widescreen"]


def test_rules_and_execution_are_no_content() -> None:
    before = load_recipe("hdvg")
    assert changed_content(before, load_recipe("hdvg", ["rules.still=null", "execution.cpus=1", "embed.batch_size=8"])) == []
    after = load_recipe("hdvg", ["analysis.skip=none", "caption.options.model=other"])
    assert changed_content(before, after) == [
        ("analysis.skip", "nonreference", "none"),
        ("caption.options.model", "Salesforce/blip2-opt-2.7b", "other"),
    ]


def test_how_a_machine_computes_is_no_content() -> None:
    before = load_recipe("hdvg")
    changes = ["analysis.threads=4", "caption.options.device=cuda", "caption.options.batch_size=4"]
    assert changed_content(before, load_recipe("hdvg", changes)) == []
    assert changed_content(before, load_recipe("hdvg", ["clips.threads=4"])) != []  # x264 writes other bytes
