"""docs/notebook.ipynb runs from its first cell to its last in a kernel, on a dataset where it looks for one, and is short."""

from __future__ import annotations

import ast
import base64
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import PIL.Image
import pyarrow as pa
import pytest
from nbclient import NotebookClient

from .training_datasets import add_captions, kept, training_dataset

NOTEBOOK = Path(__file__).parent.parent / "docs/notebook.ipynb"
TIME_LIMIT = 900
"""In seconds. It takes about one minute of processor time, with everything that a kernel imports; others may work beside it."""


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_is_stored_without_results() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None and not cell.metadata for cell in code(notebook))


def test_is_as_short_as_it_says() -> None:
    statements = [line for cell in code(read()) for line in ast.walk(ast.parse(cell.source)) if isinstance(line, ast.stmt)]
    imports = [line for line in statements if isinstance(line, ast.Import | ast.ImportFrom)]
    assert "in a dozen lines" in read().cells[0].source and len(statements) - len(imports) == 12


def test_importing_what_it_takes_names_from_is_light() -> None:
    packages = "videofactory.model, videofactory.model.training, videofactory.model.evaluation"
    done = subprocess.run([sys.executable, "-c", f"import sys, {packages}; sys.exit('torch' in sys.modules)"], check=False)
    assert done.returncode == 0


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after its run, as Jupyter starts it: in the folder that it lies in."""
    root = tmp_path_factory.mktemp("clone")
    (root / "docs").mkdir()
    dataset = Path(training_dataset(root / "made", seconds=3))
    captions = [{"clip_id": row["clip_id"], "seen_caption": "a red circle moving left"} for row in kept(str(dataset))]
    add_captions(str(dataset), "motion", pa.Table.from_pylist(captions))
    (root / "data").mkdir()
    dataset.rename(root / "data/sample")
    notebook = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # the kernel's; more wait for each other on tensors as small as these
        NotebookClient(notebook, timeout=TIME_LIMIT, resources={"metadata": {"path": str(root / "docs")}}).execute()
    assert (root / "runs/notebook/pipeline/model_index.json").is_file()
    return notebook


def results(notebook: Any, kind: str) -> list[str]:
    """What cells ended with, of one kind, in their order."""
    found = [output.data for cell in code(notebook) for output in cell.outputs if output.output_type == "execute_result"]
    return [data[kind] for data in found if kind in data]


@pytest.mark.timeout(TIME_LIMIT)
class TestExecuted:
    def test_every_cell_ran(self, executed: Any) -> None:
        assert [cell.execution_count for cell in code(executed)] == list(range(1, len(code(executed)) + 1))

    def test_clips_and_videos_are_shown(self, executed: Any) -> None:
        clips, videos = (PIL.Image.open(io.BytesIO(base64.b64decode(data))) for data in results(executed, "image/png"))
        assert clips.width == 8 * 114 - 2 + 16 and videos.width == 8 * 114 - 2 + 16
        for sheet in (clips, videos):
            colours = sheet.convert("RGB").getcolors(sheet.width * sheet.height)
            assert colours is not None and len(colours) > 1000  # far more than letters on white have

    def test_scores_are_numbers(self, executed: Any) -> None:
        scores = ast.literal_eval(results(executed, "text/plain")[-1])
        assert set(scores) == {"fvd", "kid", "motion"} and all(math.isfinite(score) for score in scores.values())
        assert scores["fvd"] > 0 and scores["motion"] > 0
