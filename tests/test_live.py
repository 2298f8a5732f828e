"The training drawn while it runs: odd logs, and a real notebook."
from __future__ import annotations

import math
import os
import re

import pytest
from _book import root

from jumprelu_nb.train.live import Live, live_html, panel


@pytest.mark.parametrize("log", [[], [dict(tokens=1)], [dict(tokens=1, l0=math.nan, fvu=0., dead=None)], [dict(tokens=0, l0=0., fvu=1e-30, seconds=0.)], [dict(tokens=10**12, l0=1e9, fvu=1e9, dead=1., seconds=1e6, tokens_per_second=1)],
                                 [dict(tokens=k, fvu=10.**-k, l0=float("inf"), theta_50=-1.) for k in range(1, 9)], [dict(tokens="x"), dict(l0=1.)]])
def test_any_log(log):
    html = live_html(log, 100, 4.)
    assert html.count("<svg") == html.count("</svg>") and not re.search(r"[^a-z]nan|[^a-z]inf[^a-z]", re.sub(r"<text.*?</text>|aria-label=\"[^\"]*\"", "", html))


def test_names_are_escaped():
    assert "<script" not in live_html([dict(tokens=1, l0=1.)], name="<script>") + panel("<script>", {"<script>": ([1], [1.]), "b": ([1], [2.])}, 2)


def test_silent_without_a_notebook(capsys):
    assert Live(10).show([dict(tokens=10, l0=1.)]) is False and capsys.readouterr().out == ""


def test_in_a_real_notebook(tmp_path):
    "One output, the last state, and a light notebook"
    nbf, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    code = ["import torch, jumprelu_nb as jr\nx = torch.randn(4000, 24, generator=torch.Generator().manual_seed(0))",
            "run = jr.train(x, d_sae=96, l0=6, tokens=150_000, batch_size=256, live=True)",
            "run = jr.train(x, recipe='topk', d_sae=48, l0=6, tokens=50_000, batch_size=256, live=True, progress=False)"]
    nb = nbf.v4.new_notebook(cells=[nbf.v4.new_code_cell(c) for c in code], metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")))
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(tmp_path/"ipython"), "JUPYTER_PLATFORM_DIRS": "1"}
    nbclient.NotebookClient(nb, timeout=120, resources=dict(metadata=dict(path=str(tmp_path)))).execute(env=env)
    path = tmp_path/"live.ipynb"
    nbf.write(nb, path)
    assert path.stat().st_size < 200_000, path.stat().st_size
    for cell, panels, tokens in ((nb.cells[1], 6, 150_016), (nb.cells[2], 3, 50_176)):
        drawn = ["".join(o.data["text/html"]) for o in cell.outputs if "text/html" in o.get("data", {}) and "data-view" in o.data["text/html"]]
        assert len(drawn) == 1 and drawn[0].count("<svg") == panels and len(drawn[0]) < 20_000
        assert f"{tokens:,} tokens" in next(o.data["text/plain"] for o in cell.outputs if "data-view" in o.get("data", {}).get("text/html", ""))
        assert "100.0%" in drawn[0]
