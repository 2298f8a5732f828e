"The browser's widgets without a kernel, its files, and what it stores in a notebook."
import json, re
from pathlib import Path
import pytest, torch
from _book import nbs, pages
from _workbench import HOSTILE, make

W = pytest.importorskip("ipywidgets")
from jumprelu_nb.browse.browser import Browser, browse, tabs  # noqa: E402
from jumprelu_nb.browse.parts import Notes  # noqa: E402
from jumprelu_nb.interpret.latents import LatentStats  # noqa: E402
from jumprelu_nb.sae.model import SAE  # noqa: E402


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    d = tmp_path_factory.mktemp("bench")
    return d, *make(d, 64, 6000)


@pytest.fixture
def b(bench): return browse(bench[2 + 1], bench[2], bench[1], latent=0)


def walk(w):
    yield w
    for c in getattr(w, "children", ()): yield from walk(c)


def html(b): return "".join(w.value for w in walk(b.box) if isinstance(w, W.HTML))
def button(b, name): return next(w for w in walk(b.box) if isinstance(w, W.Button) and w.description == name)


def test_hostile_tokens_in_every_tab(b):
    b.state.prompt = "<script>window.__xss=5</script> \u202e \0 x"
    for tab in tabs:
        b.state.tab = tab
        if tab == "steer": b.state.start, b.state.length = "<img src=x onerror=y>", 4; b.tab("steer").run()
        h = html(b)
        assert not re.search(r"<script|<img|</style><u>|\u202e|\0", h, re.I), tab
        assert "could not be drawn" not in h, re.search("could not be drawn.*?<", h)[0]
    b.state.tab = "latent"
    assert "&lt;script&gt;window.__xss=1&lt;/script&gt;" in html(b)


def test_buttons_slider_and_number(b):
    button(b, "next").click(); assert b.state.latent == 1 and b.number_box.value == 1 and b.slider.value == 1
    b.slider.value = 9; assert b.state.latent == 9 == b.number_box.value
    b.number_box.value = 63; button(b, "next").click(); assert b.state.latent == 0
    b.number_box.value = -5; assert "no latent -5" in html(b) and b.slider.value == 0
    seen = set()
    for _ in range(20): button(b, "random").click(); seen.add(b.state.latent)
    assert len(seen) > 5 and all(b.stats.alive[i] for i in seen)


def test_everything_is_a_native_control(b):
    "Buttons, boxes, lists: what the keyboard reaches in every front end; a slider never without a number"
    native = (W.Button, W.ToggleButton, W.ToggleButtons, W.IntText, W.FloatText, W.Text, W.Textarea, W.Checkbox, W.Dropdown, W.HTML, W.Box, W.IntSlider, W.FloatSlider)
    for t in tabs:
        b.state.tab = t
        for w in walk(b.box): assert isinstance(w, native), w
    assert all(w.__module__.startswith("ipywidgets") for w in walk(b.box))


def test_jumps(b):
    b.state.tab = "search"; b.state.query = "self"
    jumps = b.tab("search").jumps.widget
    assert jumps.options and jumps.value is None
    jumps.value = jumps.options[-1][1]
    assert b.state.tab == "latent" and b.state.latent == jumps.options[-1][1]


def test_filters(b):
    b.state.tab = "search"
    def hits(): return int(re.search(r'data-hits="(\d+)"', html(b))[1])
    every = hits(); b.state.least = .05; some = hits(); b.state.most = .06
    assert every > some > hits()
    b.state.least, b.state.most, b.state.which = 0., 1., "dead"
    assert hits() + every == 64
    b.state.which = "all"; b.state.theta_from = b.highest + 1; assert hits() == 0
    b.state.theta_from = float("nan"); assert "not a number" in html(b)


def test_the_wrong_partner(bench, b):
    d, lm, sae, stats = bench
    other = SAE(128, 64, metadata=dict(sae.metadata, site="resid_post.1")).init_(seed=9)
    bad = browse(stats, other, lm)
    assert bad.sae is None and "resid_post.1" in html(bad) and "resid_post.2" in html(bad) and "resid_post.1" in bad.to_html()
    bad.state.tab = "prompt"; bad.state.prompt = "x"; assert "give the SAE" in html(bad)
    for tab in tabs: bad.state.tab = tab; assert "could not be drawn" not in html(bad)


def test_messages_instead_of_errors(b):
    s = b.state
    for latent in (-1, 64, 10**9):
        for tab in tabs: s.tab, s.latent = tab, latent; assert "could not be drawn" not in html(b); b.to_html()
    s.latent, s.tab = 3, "steer"; b.tab("steer").run()
    for k, v in dict(value=float("inf"), length=0, temperature=float("nan"), mode="scale", where="active", start="", seed=-3).items(): setattr(s, k, v); assert "could not be drawn" not in html(b), html(b)[-400:]
    s.tab = "prompt"
    for text in ("", "   ", "\n\n", "x = 1\n" * 500, "\ud800"[:0] + "é"): s.prompt = text; assert "could not be drawn" not in html(b)


def test_empty_and_tiny_statistics():
    for n in (1, 2):
        b = browse(LatentStats(n))
        for tab in tabs: b.state.tab = tab; assert "could not be drawn" not in html(b)
        button(b, "next").click(); button(b, "random").click()
        assert "never fired" in b.to_html()
    b = browse(LatentStats(3, sample=0)); assert b.state.latent == 0


def test_notes(tmp_path, bench):
    p = tmp_path/"sub"/"notes.json"
    b = browse(bench[3], bench[2], latent=5, notes=p)
    b.star.value = True; b.tab("latent").note.value = "a note"
    b.number_box.value = 6
    assert b.star.value is False and b.tab("latent").note.value == ""
    b.number_box.value = 5
    assert b.star.value is True and b.tab("latent").note.value == "a note"
    assert json.loads(p.read_text())["latents"] == {"5": dict(star=True, note="a note")} and list(p.parent.iterdir()) == [p]
    b.state.tab = "search"; b.state.which = "starred"; assert 'data-hits="1"' in html(b)
    p.write_text('{"latents": [1]}')
    bad = browse(bench[3], notes=p)
    assert "damaged" in html(bad)
    bad.write(star=True); assert p.read_text() == '{"latents": [1]}', "a file that was not understood is never overwritten"
    assert Notes(p.parent/"none.json") == {}


def test_a_folder(bench):
    b = browse(bench[0], lm="embedded", latent=2)
    assert b.sae is not None and b.lm is not None and len(b.log) == 18
    b.state.tab = "training"; assert 'data-lines="18"' in html(b)
    assert json.loads((bench[0]/"cfg.json").read_text())["metadata"]["recipe"]["relative_bandwidth"] == .5 and b.bandwidth is not None


def test_comparison(bench):
    d, lm, sae, stats = bench
    b = browse(stats, sae, lm, 4, other=(stats, sae))
    b.state.prompt = "import os"; b.state.tab = "compare"
    assert 'data-match="4"' in html(b) and html(b).count('data-view="prompt"') == 2


def test_the_static_card(b):
    bundle = b._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"} and len(bundle["text/html"]) < 50_000
    assert "<script" not in bundle["text/html"].lower() and 'data-latent="0"' in bundle["text/html"]
    assert all(shown in bundle["text/html"] for shown in ("&lt;script&gt;", "\\u202E"))


def test_executed_notebook_is_small(bench, tmp_path):
    "With all widget state stored by the front end, and without; every tab having been opened"
    nbclient, nbf = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    import os
    from _book import root
    fresh = f"import jumprelu_nb as jr\njr.browse({str(bench[0])!r}, lm='embedded')"
    code = f"import jumprelu_nb as jr\nb = jr.browse({str(bench[0])!r}, lm='embedded')\nfor t in ('prompt', 'search', 'map', 'steer', 'training', 'latent'): b.state.tab = t\nb"
    os.environ["PYTHONPATH"] = str(root)
    for stored, code, limit in ((True, fresh, 120_000), (True, code, 200_000), (False, code, 50_000)):
        nb = nbf.v4.new_notebook(cells=[nbf.v4.new_code_cell(code)], metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")))
        nbclient.NotebookClient(nb, timeout=120, store_widget_state=stored, resources=dict(metadata=dict(path=str(tmp_path)))).execute()
        out = nb.cells[0].outputs[-1]["data"]
        assert "application/vnd.jupyter.widget-view+json" in out and "text/html" in out
        size = len(nbf.writes(nb).encode())
        print(f"executed notebook, widget state {'stored' if stored else 'not stored'}: {size/1000:.0f} KB")
        assert size < limit and ("widgets" in nb.metadata) == stored


def test_no_notebook_of_the_book_stores_widgets():
    for p in pages(): assert "widgets" not in json.loads((nbs/p).read_text(encoding="utf-8"))["metadata"], f"nbs/{p}: remove metadata.widgets"


def test_the_browser_is_quick(bench):
    "Drawing another latent, without the way to the screen (bench/browser.py measures that)"
    import statistics, time
    b, took = browse(bench[3], bench[2], bench[1], latent=0), []
    for _ in range(15):
        t = time.perf_counter(); button(b, "next").click(); took.append(time.perf_counter() - t)
    assert statistics.median(took) < .1, took
    assert isinstance(b, Browser) and Path(bench[0]).exists() and HOSTILE and torch.is_tensor(b.theta)
