"""The example notebook runs from top to bottom.  Needs the checkout, not only the package."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "integrations" / "notebook" / "perco.ipynb"


@pytest.mark.notebook
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install '.[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[notebook]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # pictures are not kept in it
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.execute(cwd=tmp_path)  # raises the error of a cell
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code]
    assert shown == [True, False, True, True, False, True, False]
    table = next(output["data"]["text/markdown"] for output in code[-1].outputs if "data" in output)
    assert "| 0.002 | default |" in table and "| 0.002 | WebP |" in table
