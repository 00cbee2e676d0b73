"""The card and the report page: their numbers against SQL, hostile texts, the same bytes again, and the page in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from videofactory.pipelines import formats
from videofactory.pipelines.card import code, text
from videofactory.pipelines.contact_sheet import LARGEST_PICTURE, web_address
from videofactory.pipelines.funnel import funnel
from videofactory.pipelines.histogram import Axis, RuleReader, Threshold, histograms, round_values
from videofactory.pipelines.histogram_drawing import draw
from videofactory.pipelines.recipe import RecipeError
from videofactory.pipelines.report import CARD, PAGE, RECIPE, write_report
from videofactory.shards.index import Index, amend_clips
from videofactory.shards.lease import Lease
from videofactory.shards.schema import Column, clip_schema, source_schema, split_of, table_of
from videofactory.shards.storage import Storage
from videofactory.shards.writer import THUMBNAILS, put_record, put_thumbnails

from .datasets import source_row
from .media import write_video
from .report_datasets import HOSTILE, RULES, SIGNALS, build, recipe, thumbnail


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = build(tmp_path_factory.mktemp("report") / "out")
    write_report(storage)
    return storage


def count(storage: Storage, condition: str, table: str = "clips") -> int:
    """Rows of a table, counted on their own."""
    return int(Index(storage).query(f"select count(*) as n from {table} where {condition}")["n"][0].as_py())


class Document(HTMLParser):
    """What a browser would make of a page: tags with attributes, and the visible text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def steps(self) -> dict[tuple[str, str], int]:
        """The funnel's lines: count by kind and label."""
        return {
            (str(found["data-kind"]), str(found["data-label"])): int(str(found["data-count"]))
            for tag, found in self.tags
            if tag == "tr" and "data-kind" in found
        }


class TestFunnel:
    def test_every_line_is_what_sql_counts(self, dataset: Storage) -> None:
        found = funnel(Index(dataset), RULES)
        assert found.candidates == count(dataset, "true") == 72
        assert found.sources == {"done": 5, "failed": 2, "pending": 2}  # the last clip of one analysed source is still pending
        assert list(found.rejected) == list(RULES)
        for rule, clips in found.rejected.items():
            assert clips == count(dataset, f"rejected_by = '{rule}'"), rule
        assert all(found.rejected[rule] for rule in RULES if rule != "never") and found.rejected["never"] == 0
        assert found.unmeasured == {"brightness": count(dataset, "rejected_by = 'unmeasured:brightness'")}
        assert found.failed == {"encode_failed": 1} and found.pending == 1
        assert found.failed_sources == {"not_a_video": 2}
        assert found.kept == count(dataset, "shard is not null") == sum(found.kept_by_split.values()) > 0
        assert found.analysed == 6
        assert found.source_seconds == pytest.approx(6 * 90)
        assert found.kept_bytes == found.kept * len(b"not decoded here")
        assert found.shards == 1

    def test_lines_lead_from_candidates_to_kept(self, dataset: Storage) -> None:
        rows = funnel(Index(dataset), RULES).rows()
        assert rows[0].kind == "candidates" and rows[-1].kind == "kept"
        assert rows[-2].left == rows[-1].count
        for before, row in pairwise(rows[:-1]):
            assert row.left == before.left - row.count
        assert sum(row.share for row in rows[1:]) == pytest.approx(1.0)

    def test_rules_of_earlier_recipes_follow_the_recipes_own(self, dataset: Storage) -> None:
        assert list(funnel(Index(dataset), ["still", "new"]).rejected)[:3] == ["still", "new", "dark"]

    def test_an_empty_dataset_has_an_empty_funnel(self, tmp_path: Path) -> None:
        found = funnel(Index(str(tmp_path)))
        assert [(row.kind, row.count, row.share) for row in found.rows()] == [("candidates", 0, 0.0), ("kept", 0, 0.0)]


class TestThresholds:
    @pytest.mark.parametrize(
        ("sql", "expected"),
        [
            ("motion >= 0.002", [("motion", 0.002)]),
            ("0.5 < Brightness", [("brightness", 0.5)]),
            ("width / height between 1.7 and 1.85", [("width / height", 1.7), ("width / height", 1.85)]),
            ("not (a > -3 or b <= 2.5e-1)", [("a", -3.0), ("b", 0.25)]),
            ("a >= 2 * 3 and b = '4'::int", [("a", 6.0), ("b", 4.0)]),
            ("least(width, height) >= 720", [("least(width, height)", 720.0)]),
            ("(a + 1) * (b - 1) > 2", [("(a + 1) * (b - 1)", 2.0)]),
            ("a > b", []),
            ("a > random()", []),
            ("(select 1) > 0", []),
            ("caption like '%cat%'", []),
            ("codec = 'h264'", []),
            ("a >= ", []),
        ],
    )
    def test_constants_in_comparisons_are_found(self, sql: str, expected: list[tuple[str, float]]) -> None:
        assert [(line.subject, line.value) for line in RuleReader().thresholds("r", sql)] == expected


def clips_of(values: list[float | None], states: list[tuple[str, str | None]]) -> pa.Table:
    return pa.table(
        {
            "motion": pa.array(values, pa.float64()),
            "duration": pa.array([None] * len(values), pa.float64()),
            "state": [state for state, _ in states],
            "rejected_by": pa.array([rule for _, rule in states], pa.string()),
        }
    )


class TestHistograms:
    def test_every_clip_with_a_value_is_in_a_bin(self, dataset: Storage) -> None:
        index = Index(dataset)
        columns = [Column(name, "", "") for name in SIGNALS]
        drawn = {found.subject: found for found in histograms(index.clips(), columns, RULES)}
        assert set(drawn) == {"duration", *SIGNALS, "least(width, height)", "width / height", "fps"}
        for name in SIGNALS:
            assert drawn[name].kept == count(dataset, f"state = 'kept' and {name} is not null")
            assert drawn[name].rejected == count(dataset, f"state = 'rejected' and {name} is not null")
            assert drawn[name].unmeasured == count(dataset, f"{name} is null")
        here = sum(bin[1] for bin in drawn["motion"].bins)
        assert here == count(dataset, "rejected_by = 'still'")
        assert [line.value for line in drawn["width / height"].thresholds] == [1.7, 1.85]

    def test_rejection_stands_on_its_side_of_the_threshold(self) -> None:
        values = [number / 100 for number in range(100)]
        states = [("rejected", "still") if value < 0.3 else ("kept", None) for value in values]
        found = next(iter(histograms(clips_of(values, states), [Column("motion", "", "")], {"still": "motion >= 0.3"})))
        edge = round(found.axis.position(0.3) * len(found.bins), 6)
        assert edge == int(edge)  # a bin begins at the threshold
        assert all(not here for place, (_, here, _) in enumerate(found.bins) if place >= edge)
        assert all(not kept for place, (kept, _, _) in enumerate(found.bins) if place < edge)
        line = draw(found).lines[0]
        assert line.text == "0.3" and draw(found).left < line.x < draw(found).right

    def test_a_heavy_tail_is_logarithmic_and_nothing_is_lost(self) -> None:
        values = [10 ** (number / 20) for number in range(-60, 60)] + [0.0, None, float("inf")]
        found = next(iter(histograms(clips_of(values, [("kept", None)] * len(values)), [Column("motion", "", "")], {})))
        assert found.axis.logarithmic and found.axis.low > 0 and found.clamped
        assert found.kept == 121 and found.measured == 121 and found.unmeasured == 1

    @pytest.mark.parametrize("value", [0.0, -2.5, 1e-9, 7e12])
    def test_a_column_of_one_value_can_be_drawn(self, value: float) -> None:
        found = next(iter(histograms(clips_of([value] * 3, [("kept", None)] * 3), [Column("motion", "", "")], {})))
        assert found.axis.low <= value <= found.axis.high and found.axis.low < found.axis.high
        assert draw(found).kept and found.kept == 3

    def test_unmeasured_columns_are_left_out(self) -> None:
        assert histograms(clips_of([None], [("kept", None)]), [Column("motion", "", "")], {"r": "motion > 1"}) == []

    def test_ticks_are_round_and_inside(self) -> None:
        assert round_values(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
        assert Axis(0.003, 40, logarithmic=True).ticks() == [0.01, 0.1, 1, 10]
        assert Threshold("r", "a", 1.0).value == 1.0


class TestCard:
    def test_the_hub_accepts_the_front_matter(self, dataset: Storage) -> None:
        hub = pytest.importorskip("huggingface_hub")
        card = hub.DatasetCard(dataset.get(CARD).decode())
        assert card.data.license == "other" and card.data.task_categories == ["text-to-video"]
        assert card.data.size_categories == ["n<1K"] and card.data.tags == ["webdataset", "video"]

    def test_numbers_rules_and_warnings_are_there(self, dataset: Storage) -> None:
        card = dataset.get(CARD).decode()
        for row in funnel(Index(dataset), RULES).rows():
            assert f"| {row.count} |" in card
        assert "`static_fraction <= 0.8 and motion >= 0.002`" in card
        assert "miniature models" in card and "| unknown | 5 |" in card
        assert "<script" not in card and "<img" not in card and "\u202e" not in card

    def test_splits_that_share_shards_are_not_offered_as_one(self, dataset: Storage) -> None:
        front = front_matter_of(dataset)
        assert "configs" not in front and front["viewer"] is False

    def test_one_split_of_kept_clips_is_offered(self, tmp_path: Path) -> None:
        storage = build(tmp_path / "out", sources=1)
        split = split_of(source_row(0)["source_id"], 0.2, 0.2)
        write_report(storage)
        name = {"train": "train", "val": "validation", "test": "test"}[split]
        assert front_matter_of(storage)["configs"][0]["data_files"] == [{"split": name, "path": "shards/*.tar"}]
        index = Index(storage)
        changed = index.query("select * from clips where state = 'kept' limit 1").to_pylist()
        with Lease(storage) as lease:
            rows = [{**{key: value for key, value in row.items() if key != "state"}, "rejected_by": "late"} for row in changed]
            amend_clips(storage, lease.run, "after", table_of(rows, clip_schema(index.signals)), index.signals)
        write_report(storage)
        assert "configs" not in front_matter_of(storage)
        assert "(1 at present)" in storage.get(CARD).decode()

    def test_a_licence_all_agree_on_is_named(self, tmp_path: Path) -> None:
        storage = build(tmp_path / "out", sources=2)
        index = Index(storage)
        sources = [{**row, "license": "CC-BY-4.0"} for row in index.sources().to_pylist() if row["status"] != "failed"]
        with Lease(storage) as lease:
            for row in sources:
                rows = index.query("select * exclude (state) from clips where source_id = ?", [row["source_id"]]).to_pylist()
                record = {**row, "attempt": 2, "status": "done"}
                put_record(storage, lease.run, record, rows, source_schema(index.signals))
        write_report(storage)
        assert front_matter_of(storage)["license"] == "cc-by-4.0"

    @pytest.mark.timeout(120)
    def test_the_loading_code_runs_as_it_stands(self, tmp_path: Path) -> None:
        video = write_video(tmp_path / "clip.mp4", [number / 25 for number in range(24)], size=(192, 108)).read_bytes()
        storage = build(tmp_path / "out", sources=3, video=video)
        write_report(storage)
        blocks = re.findall(r"```python\n(.*?)```", storage.get(CARD).decode(), re.DOTALL)
        assert len(blocks) == 2
        program = "\n".join([*blocks, "print('last', row['clip_id'], len(video), caption[:0])"])
        ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "out", capture_output=True, text=True, timeout=100)
        assert ran.returncode == 0, ran.stderr
        assert "torch.Size([2, 16, 3, 192, 344])" in ran.stdout and f" {len(video)}" in ran.stdout.splitlines()[-1]

    def test_strangers_texts_mean_only_themselves(self) -> None:
        assert text("a|b\n# c <i> [x](http://y) *z*") == r"a\|b \# c &lt;i&gt; \[x\](http:&#8203;//y) \*z\*"
        assert code("a `b` | c") == "``a `b` \\| c``"


def front_matter_of(storage: Storage) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(storage.get(CARD).decode().split("---\n")[1])
    return found


class TestPage:
    def test_numbers_are_those_of_the_funnel(self, dataset: Storage) -> None:
        document = Document(dataset.get(PAGE).decode())
        expected = {(row.kind, row.label): row.count for row in funnel(Index(dataset), RULES).rows()}
        assert document.steps() == expected

    def test_it_asks_for_nothing_and_runs_nothing(self, dataset: Storage) -> None:
        document = Document(dataset.get(PAGE).decode())
        assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & {tag for tag, _ in document.tags}
        for tag, attributes in document.tags:
            assert not [name for name in attributes if name.startswith("on")], tag
            assert attributes.get("src", "data:").startswith("data:image/jpeg;base64,") or "src" not in attributes
            assert re.match(r"#|https?://", attributes.get("href") or "#")
        assert any("default-src 'none'" in (attributes.get("content") or "") for _, attributes in document.tags)
        assert "url(" not in dataset.get(PAGE).decode().split("</style>")[0]

    def test_strangers_texts_are_shown_as_they_are(self, dataset: Storage) -> None:
        document = Document(dataset.get(PAGE).decode())
        shown = formats.line(HOSTILE, 160)
        assert "\u202e" not in dataset.get(PAGE).decode()
        assert document.text.count("<script>document.title='taken'</script>") >= 3 and shown[:60] in document.text
        assert "{{7*7}}" in document.text

    def test_sheets_show_a_fixed_choice_with_reasons(self, dataset: Storage) -> None:
        document = Document(dataset.get(PAGE).decode())
        pictures = [attributes for tag, attributes in document.tags if tag == "img"]
        kept = min(24, count(dataset, "state = 'kept'"))
        rejected = (
            Index(dataset).query("select rejected_by, count(*) as n from clips where state = 'rejected' group by 1").to_pylist()
        )
        assert len(pictures) == kept + sum(min(12, row["n"]) for row in rejected)
        value = Index(dataset).query("select brightness from clips where rejected_by = 'dark' order by md5(clip_id)")[
            "brightness"
        ]
        assert f"brightness {formats.number(value[0].as_py())}" in document.text

    def test_the_same_index_gives_the_same_bytes(self, dataset: Storage) -> None:
        before = dataset.get(CARD), dataset.get(PAGE)
        write_report(Storage(dataset.uri), recipe())
        assert (dataset.get(CARD), dataset.get(PAGE)) == before

    def test_a_stored_recipe_that_cannot_be_used_is_named(self, tmp_path: Path) -> None:
        storage = Storage(str(tmp_path))
        storage.put(RECIPE, b"ruels: {}")
        with pytest.raises(RecipeError, match=r"recipe.yaml.*'ruels'.*'rules'"):
            write_report(storage)

    def test_pictures_are_bounded(self, tmp_path: Path) -> None:
        storage = build(tmp_path / "out", sources=6)
        run = storage.list(THUMBNAILS)[0].name.removesuffix(".parquet").rpartition("-")[0]
        noise = thumbnail(1) + bytes(LARGEST_PICTURE - 20_000)
        rows = Index(storage).clips().to_pylist()
        for entry in storage.list(THUMBNAILS):
            storage.delete(entry.name)
        put_thumbnails(
            storage, f"{run}-compacted.parquet", {row["clip_id"]: noise for row in rows[1:]} | {rows[0]["clip_id"]: b"GIF"}
        )
        write_report(storage)
        page = storage.get(PAGE)
        assert len(page) < 5_000_000
        pictures = [tag for tag, _ in Document(page.decode()).tags if tag == "img"]
        assert 40 < len(pictures) < 72 and b"have no thumbnail" in page

    def test_datasets_without_recipe_thumbnails_or_clips_get_a_page(self, tmp_path: Path) -> None:
        storage = build(tmp_path / "out", sources=1)
        for entry in (*storage.list(THUMBNAILS), *storage.list("", "recipe.yaml")):
            storage.delete(entry.name)
        write_report(storage)
        assert b"a rule of an earlier recipe" in storage.get(PAGE) and b"No thumbnails are stored" in storage.get(PAGE)
        empty = Storage(str(tmp_path / "empty"))
        write_report(empty)
        assert Document(empty.get(PAGE).decode()).steps() == {("candidates", "candidates"): 0, ("kept", "kept"): 0}
        assert front_matter_of(empty)["viewer"] is False


@pytest.mark.parametrize(
    "address", ["javascript:alert(1)", "file:///etc/passwd", "data:text/html,x", "//x.org", "http://[", None, "https:x"]
)
def test_only_web_addresses_become_links(address: str | None) -> None:
    assert web_address(address) is None
    assert web_address("https://example.org/?a=1") == "https://example.org/?a=1"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: formats.number(0.00204), "0.00204"),
        (lambda: formats.number(1234567.0), "1.23e+06"),
        (lambda: formats.number(12345), "12,345"),
        (lambda: formats.number(100.0), "100"),
        (lambda: formats.number(-0.25), "-0.25"),
        (lambda: formats.number(None), "not measured"),
        (lambda: formats.seconds(7200.0), "2.0 h"),
        (lambda: formats.size(1_500_000), "1.5 MB"),
        (lambda: formats.percent(0.00001), "<0.1%"),
        (lambda: formats.percent(0.5), "50.0%"),
        (lambda: formats.line("a\x00\n\u202eb\ud800  c", 10), "a b c"),
        (lambda: formats.line("abcdef", 4), "abc…"),
    ],
)
def test_numbers_are_written_for_people(call: Callable[[], str], expected: str) -> None:
    assert call() == expected


@pytest.mark.timeout(120)
def test_a_browser_shows_the_page_and_runs_nothing(dataset: Storage, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on PATH")
    command = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"),
        dataset.local_path(PAGE).as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
    document = Document(ran.stdout)
    expected = {(row.kind, row.label): row.count for row in funnel(Index(dataset), RULES).rows()}
    assert document.steps() == expected, ran.stderr
    assert "<title>trial: dataset report</title>" in ran.stdout
    assert "script" not in {tag for tag, _ in document.tags}
    # A request or script that the policy stops would be reported on the console.
    assert "Content Security Policy" not in ran.stderr and "CONSOLE" not in ran.stderr
