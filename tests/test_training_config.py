"""Settings of training: read, overridden, refused with a way out, compared, and described in a page that is fresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from videofactory.model.training import reference
from videofactory.model.training.config import (
    FREE,
    RECIPES,
    ConfigError,
    TrainingConfig,
    check_same,
    differences,
    dump_config,
    is_free,
    load_config,
    parse_config,
)

ROOT = Path(__file__).parent.parent
TWO_BUCKETS = Path(__file__).parent / "two_buckets.yaml"
FULL = {"ema": {}, "validation": {"prompts": ["a"]}, "model": {"start": "miniature", "train": "lora"}}
VIDEO = "data.buckets=[{frames: 16, height: 64, width: 112, batch: 1}]"


def refusal(*overrides: str, source: str | Path = TWO_BUCKETS) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(source, overrides)
    return str(error.value)


class TestReading:
    @pytest.mark.parametrize("recipe", sorted(file.stem for file in RECIPES.glob("*.yaml")))
    def test_recipes_load_and_come_back_as_they_were(self, recipe: str, tmp_path: Path) -> None:
        config = load_config(recipe)
        (tmp_path / "again.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "again.yaml") == config
        assert parse_config(config.model_dump(mode="json"), "json") == config

    def test_the_recipe_that_nobody_ran_says_so(self) -> None:
        assert "NOT RUN" in (RECIPES / "full.yaml").read_text()
        assert "not run" in load_config("full").about

    def test_overrides_reach_everything(self) -> None:
        overrides = [
            "steps=200",
            "optimiser.learning_rate=3e-4",
            "data.buckets.1.batch=3",
            "ema=null",
            "model.start.image_model=sd",
        ]
        config = load_config(TWO_BUCKETS, overrides)
        assert (config.steps, config.optimiser.learning_rate, config.data.buckets[1].batch, config.ema) == (200, 3e-4, 3, None)
        assert config.model.start.image_model == "sd"
        assert config.model.start.saved is None

    @pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", "0.0001", "1.0e-04", "+1e-4"])
    def test_numbers_are_written_as_people_do(self, number: str) -> None:
        assert load_config(TWO_BUCKETS, [f"optimiser.learning_rate={number}"]).optimiser.learning_rate == 1e-4

    def test_adapters_have_defaults(self) -> None:
        lora = load_config(TWO_BUCKETS, ["model.train=lora"]).model.lora
        assert lora is not None
        assert lora.rank == 16

    def test_nothing_changes_afterwards(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            load_config(TWO_BUCKETS).steps = 3  # type: ignore[misc]

    def test_the_data_loader_gets_what_was_set(self) -> None:
        data = load_config(TWO_BUCKETS, ["data.where=duration > 2", "data.fps=6", "data.order=shards"]).data
        options = data.loading(5, split="val")
        assert (options.seed, options.split, options.where, options.order) == (5, "val", "duration > 2", "shards")
        assert (options.image_share, options.caption_dropout, options.captions) == (0.25, 0.1, ("caption",))
        assert [(bucket.frames, bucket.height, bucket.width, bucket.batch) for bucket in data.loaded_buckets()] == [
            (16, 64, 112, 2),
            (1, 64, 112, 8),
        ]
        assert {bucket.fps for bucket in data.loaded_buckets()} == {6.0}

    def test_what_the_unet_is_told(self) -> None:
        model = load_config(TWO_BUCKETS, ["model.interaction=joint_window", "model.swap_windows=[[4, 4, 7], [4, 4, 7]]"]).model
        assert model.overrides == {"interaction": "joint_window", "swap_windows": ((4, 4, 7), (4, 4, 7))}


class TestRefusals:
    @pytest.mark.parametrize(
        ("override", "says"),
        [
            ("stpes=3", "key 'stpes': is unknown; did you mean 'steps'?"),
            ("ema.decya=0.9", "key 'ema.decya': is unknown; did you mean 'decay'?"),
            ("data.buckets.0.batsch=1", "key 'data.buckets.0.batsch': is unknown; did you mean 'batch'?"),
            ("model.start.imagemodel=x", "did you mean 'image_model'?"),
            ("log.qqqqq=1", "known are: every, project, trackers"),
            ("steps='3'", "key 'steps': Input should be a valid integer (it is '3')"),
            ("steps=0", "greater than or equal to 1 (it is 0)"),
            ("compile=1", "valid boolean (it is 1)"),
            ("optimiser.learning_rate=fast", "valid number (it is 'fast')"),
            ("optimiser.learning_rate=.inf", "finite number"),
            ("optimiser.accumulate=0", "greater than or equal to 1 (it is 0)"),
            ("optimiser.betas=[0.9, 1]", "below 1, for example [0.9, 0.999]"),
            ("precision=float16", "'float32' or 'bfloat16' (it is 'float16')"),
            ("log.trackers=[mlflow]", "'tensorboard', 'wandb' or 'trackio' (it is 'mlflow')"),
            ("model.spatial=half", "'trained' or 'frozen' or Input should be a valid number (it is 'half')"),
            ("data={}", "key 'data.dataset': must be given: a dataset of clips"),
            ("data.buckets=3", "key 'data.buckets'"),
            ("data.buckets.7.batch=1", "a list of 2 has no item '7'; items go by number, from 0"),
            ("data.dataset", "not of the form key=value"),
            ("seed=[1", "the value is no YAML"),
        ],
    )
    def test_name_the_key_the_value_and_the_nearest(self, override: str, says: str) -> None:
        assert says in refusal(override)

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["noise.zero_terminal_snr=true"], "zero_terminal_snr is true and prediction is 'epsilon'"),
            (["noise.zero_terminal_snr=true", "noise.min_snr_gamma=5"], "min_snr_gamma 5 divides by its ratio of 0"),
            (["model.train=lora", "model.spatial=frozen"], "choose the adapted layers with lora.targets"),
            (["model.train=lora", "model.spatial=0.1"], "spatial is 0.1 and train is 'lora'"),
            (["model.lora={rank: 4}"], "set train to lora, or lora to null"),
            (["model.start={image_model: a, video_model: b}"], "image_model 'a' and video_model 'b' is given"),
            (["model.start={}"], "nothing is given"),
            (["data.image_share=0"], "a bucket has frames 1 and image_share is 0"),
            ([VIDEO], "image_share is 0.25 and no bucket has frames 1"),
            (["data.image_share=1"], "image_share is 1 and a bucket has more than one frame"),
            (
                ["data.buckets=[{frames: 1, height: 64, width: 64, batch: 1}]"],
                "image_share is 0.25 and every bucket has frames 1",
            ),
            (["data.buckets.0.width=115"], "width 115 is no multiple of 8, the pixels per latent position; take 112 or 120"),
            (["data.buckets.1.frames=16"], "two buckets have the size 16x64x112"),
            (["model.spatial=frozen"], "model.spatial is 'frozen' and data.image_share is 0.25"),
            (["optimiser.warmup_steps=400"], "optimiser.warmup_steps is 400 and steps is 300"),
            (
                ["checkpoints.keep_every=150"],
                "keep_every 150 is no multiple of every 100, so there may be nothing to keep; take 200",
            ),
            (["validation.prompts=[]", "validation.split=null"], "no prompts and split is null"),
            (
                ["data.buckets=[{frames: 1, height: 64, width: 64, batch: 1}]", "data.image_share=1"],
                "validation.prompts has 2 texts and data.buckets has no size of more than 1 frame",
            ),
        ],
    )
    def test_of_what_does_not_go_together_say_both(self, overrides: list[str], says: str) -> None:
        assert says in refusal(*overrides)

    @pytest.mark.parametrize(
        "overrides",
        [
            ["noise.zero_terminal_snr=true", "noise.prediction=v_prediction", "noise.min_snr_gamma=5"],
            [VIDEO, "data.image_share=0", "model.spatial=frozen"],
            ["model.train=lora"],
            ["model.spatial=0.1"],
        ],
    )
    def test_ways_out_are_ways_out(self, overrides: list[str]) -> None:
        assert load_config(TWO_BUCKETS, overrides).fingerprint() != load_config(TWO_BUCKETS).fingerprint()

    def test_of_files(self, tmp_path: Path) -> None:
        assert "none of full, miniature" in refusal(source="nope")
        for text, says in (
            ("- 1", "is list"),
            ("a: [", "cannot be read as YAML"),
            ("steps: 1\nsteps: 2", "'steps' stands twice"),
        ):
            (tmp_path / "bad.yaml").write_text(text)
            assert says in refusal(source=tmp_path / "bad.yaml")
        (tmp_path / "bad.yaml").write_text("a: !!python/object/apply:os.system [true]")
        assert "cannot be read as YAML" in refusal(source=tmp_path / "bad.yaml")


class TestContinuing:
    @pytest.mark.filterwarnings("ignore:Pydantic serializer")  # of a value that is no value
    @pytest.mark.parametrize("setting", [s for group in reference.groups() for s in group.settings], ids=lambda s: s.key)
    def test_free_is_what_may_differ(self, setting: reference.Setting) -> None:
        stored = parse_config(base(), "base")
        changed = stored.model_copy(deep=True)
        replace(changed, setting.key.split("."))
        assert changed != stored
        assert ([key for key, _, _ in differences(stored, changed)] == []) == setting.free
        assert (stored.fingerprint() == changed.fingerprint()) == setting.free

    def test_the_message_names_keys_and_values(self) -> None:
        stored = load_config(TWO_BUCKETS)
        check_same(stored, load_config(TWO_BUCKETS, ["steps=900", "log.every=3", "validation=null"]), "runs/a")
        with pytest.raises(
            ConfigError, match=r"runs/a began with other settings:\n  data.buckets.0.batch: 2 there, 3 now\n  seed: 0"
        ):
            check_same(stored, load_config(TWO_BUCKETS, ["seed=1", "data.buckets.0.batch=3"]), "runs/a")

    def test_free_keys_exist(self) -> None:
        keys = {setting.key for group in reference.groups() for setting in group.settings}
        for free in FREE:
            assert any(key == free or key.startswith(f"{free}.") for key in keys), free
        assert is_free("log.every")
        assert not is_free("steps_more")

    def test_fingerprint_is_the_same_tomorrow(self) -> None:
        first, second = load_config(TWO_BUCKETS), load_config(TWO_BUCKETS, ["steps=301"])
        assert first.fingerprint() == second.fingerprint()
        assert len(first.fingerprint()) == 16
        assert first.fingerprint() != load_config(TWO_BUCKETS, ["seed=1"]).fingerprint()


class TestReference:
    def test_page_is_what_the_code_says(self) -> None:
        page = ROOT / reference.PAGE
        assert page.read_text(encoding="utf-8") == reference.page(), f"out of date; run `{reference.COMMAND}`"

    def test_holds_every_setting_with_a_meaning(self) -> None:
        described = {setting.key: setting for group in reference.groups() for setting in group.settings}
        assert set(leaves(parse_config(base(), "base").model_dump(mode="json"))) == set(described)
        assert all(setting.meaning and not setting.meaning.endswith(".") for setting in described.values())

    def test_tells_ranges_and_defaults(self) -> None:
        described = {setting.key: setting for group in reference.groups() for setting in group.settings}
        assert described["data.fps"].kind == "number above 0 to 1000 or `null`"
        assert described["optimiser.betas"].default == "[0.9, 0.999]"
        assert described["seed"].kind == "integer from 0 below 2147483648"
        assert described["steps"].default == ""
        assert yaml.safe_load(described["validation.timesteps"].default) == [50, 250, 500, 750, 950]


def base() -> dict[str, Any]:
    """Every section given."""
    bucket = {"frames": 16, "height": 64, "width": 112, "batch": 2}
    return {"output": "runs/a", "steps": 1000, "data": {"dataset": "data/a", "buckets": [bucket]}, **FULL}


def leaves(values: Any, prefix: str = "") -> list[str]:
    if isinstance(values, list) and values and isinstance(values[0], dict):
        values = {str(number): item for number, item in enumerate(values)}
    if isinstance(values, dict):
        return [key for name, value in values.items() for key in leaves(value, f"{prefix}.{name}" if prefix else name)]
    return [prefix]


def replace(config: TrainingConfig, keys: list[str]) -> None:
    """Give one setting another value, whatever it is; settings are frozen for everyone else."""
    section: Any = config
    for key in keys[:-1]:
        section = section[int(key)] if key.isdigit() else getattr(section, key)
    section.__dict__[keys[-1]] = "another value"
