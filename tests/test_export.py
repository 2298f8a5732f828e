"One file with all latents: what is in it, hostile tokens, sharding, atomicity; and the file in a real browser."
from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
import zlib
from pathlib import Path

import pytest
import torch

from jumprelu_nb.browse import export as room
from jumprelu_nb.browse.export import export_html
from jumprelu_nb.browse.page import digest, number, page_css, page_script, policy, steps
from jumprelu_nb.browse.svg import short
from jumprelu_nb.browse.tokens import hidden, shown
from jumprelu_nb.interpret.latents import LatentStats

HOSTILE = ["<script>window.__xss=1</script>", "<img src=x onerror='window.__xss=2'>", "</script><b>", "\u202eevil", "&lt;", "'\"`", "\n", "\t", "\0", "👩‍👩‍👧", "\u2066x\u2069", "]]>", "<!--<script>",
           "\ud800", "y" * 10_000, "${window.__xss=3}", "\\u003cscript\\u003e", "</title><script>window.__xss=4</script>"]


def make(n:int=40, vocab:int=600, contexts:int=60, T:int=32, seed:int=0, strings:dict|None=None) -> LatentStats:
    "Statistics of invented activations: latent i fires on tokens i, i+1, i+2; the last latent is dead; latent 1 is dense."
    g = torch.Generator().manual_seed(seed)
    stats = LatentStats(n, top_k=12, sample=6, threshold=torch.linspace(.2, 1., n))
    for _ in range(3):
        ids = torch.randint(0, min(vocab, n + 30), (contexts, T), generator=g)
        ids[:, 3::8] = torch.arange(len(HOSTILE))[torch.arange(contexts) % len(HOSTILE)][:, None]
        acts = torch.zeros(contexts, T, n)
        for i in range(n - 1):
            fires = (ids >= i) & (ids < i + 3) if i != 1 else torch.rand(ids.shape, generator=g) < .5
            acts[..., i] = fires * (stats.threshold[i] + 3 * torch.rand(ids.shape, generator=g))
        place = torch.arange(contexts)[:, None].expand(-1, T), torch.arange(T)[None].expand(contexts, -1)
        stats.update(ids, acts, documents=(place[0].contiguous(), place[1].contiguous()))
    stats.pre_tokens = stats.tokens
    stats.relate(k=6)
    stats.effects = torch.randint(0, 30, (n, 2, 10), generator=g)
    stats.effect_values = torch.randn(n, 2, 10, generator=g).abs() * torch.tensor([1., -1.])[None, :, None]
    stats.neighbours = torch.stack([torch.tensor([(i + 1) % n, (i + 2) % n]) for i in range(n)])
    stats.neighbour_cosine = torch.tensor([[.9, -.2]]).expand(n, 2)
    stats.strings = {t: HOSTILE[t] if t < len(HOSTILE) else f" tok{t}" for t in range(vocab)} if strings is None else strings
    stats.about = dict(model_name="<b>model</b>", site="resid_post.1", text="stdlib")
    return stats


@pytest.fixture(scope="module")
def stats(): return make()


def data(path:Path) -> dict:
    "Blocks of a file, unpacked."
    found = re.findall(r'<script type="text/plain" id="jr-(\w+)">([A-Za-z0-9+/=]*)</script>', path.read_text(encoding="utf-8"))
    return {k: json.loads(zlib.decompress(base64.b64decode(v))) for k, v in found}


def context(block:dict, head:dict, k:int, name:str="top") -> list[tuple[str, list[str]]]:
    "Tokens of the contexts of the k-th latent."
    every = block["tokens"][k].split("!") if block["tokens"][k] else []
    return [[head["vocab"][number(c)] for c in every[number(j)]] for j in block[name][k]]


# ------------------------------------------------------------------------------------------------ what is in it
def test_everything_comes_back(stats, tmp_path):
    path = export_html(stats, tmp_path/"f.html", contexts=(8, 2, 4))
    d = data(path)
    head, b = d["head"], d["0"]
    assert head["n"] == 40 and head["read"] == stats.tokens and len(d) == 2 and head["blocks"] == 1
    assert head["count"] == stats.count.tolist() and head["theta"] == pytest.approx(stats.threshold.tolist(), rel=1e-3)
    for i in (0, 5, 17, 38):
        x = stats[i]
        assert context(b, head, i) == [c.tokens for c in x.top[:8]]
        assert context(b, head, i, "sample") == [c.tokens for c in x.sample[:4]]
        assert [[*s[:3], len(s[3])] for s in b["strata"][i]] == [[pytest.approx(s.low, rel=.01), pytest.approx(s.high, rel=.01), s.count, min(2, len(s.contexts))] for s in x.strata]
        acts = b["acts"][i].split("!")[number(b["top"][i][0])]
        assert [number(c) / steps * x.max for c in acts] == pytest.approx(x.top[0].acts[:len(acts)], abs=.02 * x.max)
        assert all(a == 0 for a in x.top[0].acts[len(acts):])
        first, counts = b["hist"][i]
        assert counts == x.histogram[first:first + len(counts)].tolist() and sum(counts) == int(stats.count[i])
        assert sum(b["pre"][i]) == int(x.pre_histogram.sum()) and b["document"][i][0] == x.top[0].document and b["offset"][i][0] == x.top[0].offset
        assert [head["vocab"][number(c)] for c in b["up"][i][1]] == x.promoted[:8] and [number(c) for c in b["near"][i][0]] == [j for j, _ in x.neighbours]
    assert b["tokens"][39] == "" and head["count"][39] == 0


def test_only_tokens_in_use(stats, tmp_path):
    head = data(export_html(stats, tmp_path/"f.html", [17]))["head"]
    known = stats[17]
    used = {t for cs in (known.top, known.sample, *(s.contexts for s in known.strata)) for c in cs for t in c.tokens} | {*known.promoted, *known.suppressed}
    assert set(head["vocab"]) <= used and len(head["vocab"]) == len(set(zip(head["ids"], head["vocab"])))
    assert head["latents"] == [17] and head["n"] == 1


def test_bare_statistics(tmp_path):
    "No thresholds, no effects, no neighbours, no documents, one latent, none alive"
    bare = LatentStats(3, top_k=2, sample=0)
    bare.update(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, 3))
    head = data(export_html(bare, tmp_path/"dead.html"))["head"]
    assert head["count"] == [0, 0, 0] and head["theta"] is None and head["vocab"] == []
    one = LatentStats(1, top_k=2, sample=0)
    one.update(torch.arange(4)[None], torch.tensor([[[0.], [-2.], [1.], [0.]]]))
    b = data(export_html(one, tmp_path/"one.html"))["0"]
    assert b["value"][0][0] == -1000 or b["value"][0][0] == 1000


@pytest.mark.parametrize("latents", [[40], [-1], [1.5], [True]])
def test_no_such_latent(stats, tmp_path, latents):
    with pytest.raises(IndexError, match="There are 40 latents, 0 to 39"): export_html(stats, tmp_path/"f.html", latents)
    assert not list(tmp_path.iterdir())


def test_refusals(stats, tmp_path):
    with pytest.raises(ValueError, match="at least one"): export_html(stats, tmp_path/"f.html", [])
    with pytest.raises(IsADirectoryError, match="features.html"): export_html(stats, tmp_path)
    with pytest.raises(ValueError, match="Notes are"): export_html(stats, tmp_path/"f.html", notes={3: 4})
    with pytest.raises(FileNotFoundError, match="latents.safetensors"): export_html(tmp_path)


# ------------------------------------------------------------------------------------------------ nothing gets out of its block
def test_hostile(stats, tmp_path):
    notes = {0: dict(label="</script><script>window.__xss=7</script>", note="\u202e<b>", star=True)}
    path = export_html(stats, tmp_path/"f.html", notes=notes, title="</title><script>window.__xss=4</script>")
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>", text) == ['<script type="text/plain" id="jr-head">', '<script type="text/plain" id="jr-0">', "<script>"]
    assert "__xss" not in text.replace("<title>&lt;/title&gt;&lt;script&gt;window.__xss=4&lt;/script&gt;</title>", "") and "<img" not in text and "\u202e" not in text
    assert set(HOSTILE) <= set(data(path)["head"]["vocab"])                     # and yet all of it is there


def test_policy(stats, tmp_path):
    text = export_html(stats, tmp_path/"f.html").read_text(encoding="utf-8")
    assert text.index("Content-Security-Policy") < text.index("<title") and f'content="{policy()}"' in text
    assert policy().startswith("default-src 'none';") and "unsafe" not in policy()
    script, style = re.search(r"<script>(.*?)</script>", text, re.S)[1], re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert script == page_script() and style == page_css and digest(script) in policy() and digest(style) in policy()
    assert not re.search(r'\s(src|href|action|style|on\w+)="', re.sub(r"<script.*?</script>", "", text, flags=re.S))


def test_size(tmp_path):
    "A kilobyte per latent, script and style apart, with contexts of 16 tokens that nothing makes predictable"
    path = export_html(make(256, 2000, 200), tmp_path/"f.html")
    assert path.stat().st_size - len(page_script()) - len(page_css) < 1300 * 256             # uniform random tokens: the worst case; real text is measured in bench/export.py


# ------------------------------------------------------------------------------------------------ several files
def test_shards(stats, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "block", 8)
    limit = 60_000
    path = export_html(stats, tmp_path/"f.html", limit=limit)
    parts = sorted(p for p in tmp_path.iterdir() if p != path)
    assert len(parts) > 1 and all(re.fullmatch(r"f-[0-9a-f]{8}-\d{4}\.html", p.name) for p in parts)
    assert all(p.stat().st_size <= limit for p in [path, *parts]), [p.stat().st_size for p in [path, *parts]]
    index = data(path)["head"]
    assert index["blocks"] == 0 and [f for _, f in index["files"]] == [p.name for p in parts] and index["count"] == stats.count.tolist()
    at = 0
    for p, (first, _) in zip(parts, index["files"]):
        h = data(p)["head"]
        assert h["from"] == first == at and h["count"] == stats.count[at:h["to"]].tolist() and h["index"] == "f.html" and 0 <= h["start"] < h["to"] - h["from"]
        at = h["to"]
    assert at == 40
    export_html(stats, path, [1, 2, 3])                                         # smaller again: the parts of the old one go
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path/"f-somebody-elses.html").write_text("")
    (tmp_path/"f-0123abcd-0000.html.txt").write_text("")
    export_html(stats, path, limit=limit)
    assert (tmp_path/"f-somebody-elses.html").exists() and (tmp_path/"f-0123abcd-0000.html.txt").exists()


def test_a_crash_leaves_the_old_one(stats, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "block", 8)
    path = export_html(stats, tmp_path/"f.html", limit=60_000)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    real, calls = room.write_atomically, []
    def fails(p, content):
        calls.append(p)
        if p == path: raise OSError(28, "No space left on device")
        real(p, content)
    monkeypatch.setattr(room, "write_atomically", fails)
    with pytest.raises(OSError): export_html(stats, path, title="another", limit=60_000)
    assert len(calls) > 1 and calls[-1] == path                                 # the index is last
    for p, content in before.items(): assert p.read_bytes() == content


# ------------------------------------------------------------------------------------------------ in a real browser
CHROME = os.environ.get("CHROMIUM") or next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
real = pytest.mark.skipif(not CHROME, reason="no chromium")


@pytest.fixture(scope="module")
def chrome():
    pw = pytest.importorskip("playwright.sync_api")
    with pw.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"])
        yield b
        b.close()


@pytest.fixture
def opened(chrome, request):
    "Open a file; what it asks for and what goes wrong is kept."
    pages = []
    def go(path, hash="", **how):
        page = chrome.new_context(viewport=dict(width=1280, height=900), **how).new_page()
        page.set_default_timeout(10_000)
        page.requests, page.errors = [], []
        page.on("request", lambda r: page.requests.append(r.url)); page.on("pageerror", lambda e: page.errors.append(str(e)))
        page.on("console", lambda m: page.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.goto(path.as_uri() + hash)
        page.wait_for_selector("body[data-ready]")
        pages.append((page, path))
        return page
    yield go
    for page, path in pages:
        if shots := os.environ.get("JUMPRELU_SCREENSHOTS"): page.screenshot(path=Path(shots)/f"export_{request.node.name}.png")
        assert all(u.startswith(path.parent.as_uri()) for u in page.requests), page.requests
        assert not page.errors, page.errors
        assert page.evaluate("window.__xss === undefined")
        page.context.close()


@pytest.fixture(scope="module")
def file(stats, tmp_path_factory): return export_html(stats, tmp_path_factory.mktemp("export")/"features.html", notes={7: dict(label="the <i>seventh</i>", star=True)})


def latent(page): return int(page.locator("[data-latent]").get_attribute("data-latent"))


def until(page, what):
    "Wait for an expression; playwright's own waiting evaluates strings in the page, which the policy forbids."
    end = time.time() + 10
    while not page.evaluate(what):
        assert time.time() < end, what
        time.sleep(.01)


def arrives(page, i): page.wait_for_selector(f'[data-latent="{i}"]')


@real
def test_opens(file, opened):
    page = opened(file)
    assert len(page.requests) == 1 and page.title() == "<b>model</b> · resid_post.1"
    for i in range(len(HOSTILE)):
        page.evaluate(f"location.hash='f={i}'"); arrives(page, i)
    text = page.inner_text("#jr-contexts")
    assert "<script>window.__xss=1</script>" in page.evaluate("head.vocab.map(t=>shown(t)).join(' ')")
    page.evaluate("location.hash='f=0'"); arrives(page, 0)
    text = page.inner_text("#jr-contexts")
    for t in HOSTILE[:2]: assert t in text                                      # shown, not run
    assert "\\uD800" in page.evaluate("head.vocab.map(t=>shown(t)).join(' ')") and "\u202e" not in text and page.locator("#jr-app img, #jr-app b:not(.row>b), #jr-app script").count() == 0


@real
def test_walking(file, opened):
    page = opened(file, "#f=3")
    assert latent(page) == 3 and page.locator("svg line.theta").count() == 2
    page.click("text=next"); arrives(page, 4); assert page.url.endswith("#f=4")
    page.click("text=previous"); arrives(page, 3)
    page.keyboard.press("ArrowRight"); arrives(page, 4)
    page.keyboard.press("k"); arrives(page, 3)
    page.locator("[data-latent] a.chip").first.click(); arrives(page, 4)        # a neighbour
    page.go_back(); arrives(page, 3)
    page.fill("#jr-number", "12"); page.keyboard.press("Enter"); arrives(page, 12)
    seen = set()
    for _ in range(12):
        before = page.evaluate("turns"); page.keyboard.press("Escape"); page.click("text=random"); until(page, f"turns>{before}"); seen.add(page.evaluate("state.i"))
    assert len(seen) > 3 and 39 not in seen
    assert page.locator('.row[aria-current="true"]').count() == 1


@real
def test_searching(file, opened):
    page = opened(file)
    def hits(): return int(page.locator(".list").get_attribute("data-hits"))
    def ask(text, n=None):
        page.fill("#jr-query", text); until(page, "state.query===document.getElementById('jr-query').value")
        return [int(x) for x in page.locator(".row b").all_inner_texts()]
    assert hits() == 40
    assert set(ask(" tok25")) >= {23, 24, 25} and hits() < 10
    assert ask("seventh") == [7] and ask("zzz") == [] and "Nothing found" in page.inner_text("#jr-count")
    assert ask("31")[0] == 31
    assert ask("<script>window.__xss=1</script>")
    page.keyboard.press("Enter"); ask("")
    page.select_option("select[name=show]", "dead"); assert hits() == 1
    page.locator(".row").first.click(); arrives(page, 39); assert "never fired" in page.inner_text("#jr-contexts")
    page.select_option("select[name=show]", "dense"); assert 1 in [int(x) for x in page.locator(".row b").all_inner_texts()]
    page.select_option("select[name=show]", "all"); page.fill("input[name=t0]", "0.9"); assert 0 < hits() < 10
    page.fill("input[name=t0]", ""); page.fill("input[name=f0]", "40"); assert hits() == 1
    page.fill("input[name=f0]", "")
    page.select_option("select[name=sort]", "frequency"); assert page.locator(".row b").first.inner_text() == "1"
    page.check("input[name=up]"); assert page.locator(".row b").first.inner_text() == "39"
    page.select_option("select[name=sort]", "theta"); assert page.locator(".row b").first.inner_text() == "0"


@real
def test_lists_and_widths(file, opened):
    page = opened(file, "#f=5")
    def rows(): return page.locator("#jr-contexts .c").count()
    assert rows() == 8
    short_, n = len(page.inner_text("#jr-contexts")), rows()
    page.get_by_role("button", name="5", exact=True).click(); assert len(page.inner_text("#jr-contexts")) < short_ and rows() == n
    page.keyboard.press("2"); assert "firings" in page.inner_text("#jr-contexts").lower()
    page.keyboard.press("3"); assert rows() == 4
    page.keyboard.press("n"); assert page.locator("#jr-contexts br").count() > 0 and page.locator("#jr-contexts .full").count() == 4 and page.is_checked("#jr-lines")
    page.keyboard.press("n"); assert page.locator("#jr-contexts br").count() == 0
    tip = page.locator("#jr-contexts .peak").first.get_attribute("title")
    assert "document" in tip and "activation" in tip and "id " in tip


@real
def test_keyboard_reaches_everything(file, opened):
    page = opened(file)
    page.keyboard.press("/"); assert page.evaluate("document.activeElement.id") == "jr-query"
    page.keyboard.press("r"); assert page.input_value("#jr-query") == "r"       # typing is typing
    page.keyboard.press("Escape")
    assert page.evaluate("[...document.querySelectorAll('#jr-app button,#jr-app input,#jr-app select,#jr-app a[href]')].every(e=>e.tabIndex===0)")
    assert page.evaluate("[...document.querySelectorAll('#jr-app input,#jr-app select')].every(e=>e.getAttribute('aria-label')||e.closest('label'))")


@real
def test_same_tables(file, opened):
    "Python and JavaScript make tokens visible, and write numbers, in the same way"
    page = opened(file)
    texts = [*(t for t in HOSTILE if t != "\ud800"), *[f"a{chr(c)}b" for pair in hidden for c in pair if not 0xD800 <= c <= 0xDFFF], *[chr(c) for c in range(0, 0x3000, 7)], "x" * 81, "é" * 80]
    assert page.evaluate("ts=>ts.map(t=>shown(t))", texts) == [shown(t) for t in texts]
    values = [0., 1., -2.5, 3.14159, 999.4, 1000., 1236., 12345., 1.5e6, -2e9, .001234, .5, 20., 100.]
    assert page.evaluate("vs=>vs.map(short)", values) == [short(v) for v in values]


@real
def test_no_such_address(file, opened):
    page = opened(file, "#f=99")
    assert "no latent 99" in page.inner_text("[role=alert]") and "0 to 39" in page.inner_text("[role=alert]")
    page.keyboard.press("ArrowRight"); page.wait_for_selector("[data-latent]")


@real
def test_damaged_and_old(file, opened, tmp_path, chrome):
    text = file.read_text(encoding="utf-8")
    cut = tmp_path/"cut.html"
    cut.write_text(re.sub(r'(id="jr-head">.{400})[^<]*', r"\1", text), encoding="utf-8")
    assert "damaged" in opened(cut).inner_text("[role=alert]")
    bad = tmp_path/"bad.html"
    bad.write_text(re.sub(r'(id="jr-0">.{400})[^<]*', r"\1", text), encoding="utf-8")
    assert "could not be read" in opened(bad).inner_text("[role=alert]")
    context = chrome.new_context()
    context.add_init_script("delete window.DecompressionStream")
    page = context.new_page()
    page.goto(file.as_uri())
    assert "too old" in page.inner_text("[role=alert]")
    context.close()


@real
def test_injected_script_is_refused(file, tmp_path, chrome):
    "The policy at work: a script added to the file does not run, a picture is not fetched"
    bad = tmp_path/"bad.html"
    bad.write_text(file.read_text(encoding="utf-8").replace("</body>", "<script>window.__xss=9</script><img src='http://127.0.0.1:9/x.png' onerror='window.__xss=8'></body>"), encoding="utf-8")
    page, asked = chrome.new_page(), []
    page.on("requestfinished", lambda r: asked.append(r.url))
    page.goto(bad.as_uri()); page.wait_for_selector("[data-latent]")
    assert page.evaluate("window.__xss === undefined") and asked == [bad.as_uri()]
    page.close()


@real
def test_shards_in_the_browser(stats, tmp_path, monkeypatch, opened):
    monkeypatch.setattr(room, "block", 8)
    path = export_html(stats, tmp_path/"f.html", limit=60_000)
    page = opened(path)
    assert "files" in page.inner_text("#jr-stage")
    page.fill("#jr-query", "38"); until(page, "state.query==='38'")
    page.locator(".row").first.click(); arrives(page, 38)
    assert re.search(r"f-\w{8}-\d{4}\.html#f=38$", page.url)
    page.locator('[data-latent] a.chip[href*=".html"]').last.click()            # 38's neighbour 0 lives in another file
    arrives(page, 0)
    page.click("text=all latents"); page.wait_for_selector("text=choose one on the left")
    page2 = opened(path, "#f=20"); arrives(page2, 20)                           # a deep link to the index leads on


@real
def test_interactive_soon(tmp_path, opened):
    path = export_html(make(1024, 2000, 40), tmp_path/"f.html")
    start = time.perf_counter(); page = opened(path); took = time.perf_counter() - start
    assert took < 4, took                                                       # 0.3 s on an idle machine; 16,384 latents: bench/export.py
    before = time.perf_counter()
    for _ in range(10): n = page.evaluate("turns"); page.keyboard.press("j"); until(page, f"turns>{n}")
    assert (time.perf_counter() - before) / 10 < .5


@real
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable(file, opened, scheme):
    "Text against its background, in both themes: heat cells keep dark letters"
    page = opened(file, "#f=5", color_scheme=scheme)
    assert page.evaluate("getComputedStyle(document.querySelector('.peak')).color") == "rgb(26, 26, 26)"
    body = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    light = [sum(map(int, re.findall(r"\d+", c)[:3])) for c in body]
    assert (light[0] < light[1]) == (scheme == "light")
