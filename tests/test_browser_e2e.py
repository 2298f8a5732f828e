"""The browser in a real browser: Voilà serves it, Chromium is driven through it. Skipped where either is missing.

Screenshots are left in $JUMPRELU_SCREENSHOTS, or in pytest's temporary folder."""
import os, re, shutil, signal, socket, statistics, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path
import pytest
from _book import root
from _workbench import HOSTILE, make

pw = pytest.importorskip("playwright.sync_api")
pytest.importorskip("voila")
CHROME = os.environ.get("CHROMIUM") or next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
pytestmark = pytest.mark.skipif(not CHROME, reason="no chromium")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
NOT_OURS = re.compile(r"font-?awesome", re.IGNORECASE)          # Voilà's own page template asks a CDN for it
SWITCH_S = .15


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    d = Path(os.environ.get("JUMPRELU_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    d.mkdir(parents=True, exist_ok=True)
    return d


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp("nb")
    make(d)
    return d


@pytest.fixture(scope="module")
def notebook(folder):
    import nbformat as nbf
    nb = nbf.v4.new_notebook(cells=[nbf.v4.new_code_cell("import jumprelu_nb as jr\njr.browse('.', lm='embedded', latent=0, notes='notes.json')")],
                             metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")))
    nbf.write(nb, folder/"browser.ipynb")
    return folder/"browser.ipynb"


@pytest.fixture(scope="module")
def url(notebook):
    "Voilà in a process group of its own."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    d = notebook.parent
    env = {**os.environ, "PYTHONPATH": str(root), "JUPYTER_CONFIG_DIR": str(d/"jcfg"), "IPYTHONDIR": str(d/"ipy"), "JUPYTER_PLATFORM_DIRS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(d/"voila.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "voila", notebook.name, "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"], cwd=d, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            end = time.time() + 60
            while True:
                if server.poll() is not None or time.time() > end: raise RuntimeError((d/"voila.log").read_text())
                try: urllib.request.urlopen(f"http://127.0.0.1:{port}/voila/static/", timeout=5); break
                except urllib.error.HTTPError: break             # any answer: it is up
                except OSError: time.sleep(.2)
            yield f"http://127.0.0.1:{port}/"
        finally:
            try: os.killpg(server.pid, signal.SIGTERM); server.wait(20)
            except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)
            except ProcessLookupError: pass


@pytest.fixture(scope="module")
def chrome():
    with pw.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, args=ARGS)
        yield b
        b.close()


@pytest.fixture
def page(chrome):
    pg = chrome.new_page(viewport=dict(width=1280, height=1000))
    pg.set_default_timeout(30_000)
    pg.errs, pg.urls = [], []
    pg.on("pageerror", lambda e: pg.errs.append(str(e)))
    pg.on("request", lambda r: pg.urls.append(r.url))
    yield pg
    pg.close()


def test_javascript_shows_tokens_like_python(page):
    "The same table in both languages, on every code point"
    from jumprelu_nb.browse.tokens import shown, tokens_js
    page.set_content("<p>x</p>")
    page.evaluate(f"() => {{ const s = document.createElement('script'); s.textContent = {tokens_js()!r}; document.head.append(s) }}")
    ours = "".join(shown(chr(c), None) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    theirs = page.evaluate("() => { let out = ''; for (let c = 0; c < 0x110000; c++) if (c < 0xD800 || c >= 0xE000) out += shown(String.fromCodePoint(c), null); return out }")
    assert theirs == ours
    for t in [*HOSTILE, "a" * 80, "a" * 81, "🦊" * 100]: assert page.evaluate("t => shown(t, 80)", t) == shown(t, 80)


def test_click_type_slide_search_steer(page, url, folder, shots):
    expect = pw.expect
    page.goto(url, wait_until="domcontentloaded")
    view = page.locator("[data-view]").first
    def is_at(**data):
        for k, v in data.items(): expect(view).to_have_attribute(f"data-{k}", v if isinstance(v, re.Pattern) else str(v))
    expect(view).to_have_attribute("data-latent", "0", timeout=90_000)
    text = view.inner_text()
    for t in (HOSTILE[0], HOSTILE[1], "</style><u>", "\\u202E", "\\u0000", "(10,000 characters)"): assert t in text, f"{t!r} is not on the page"
    page.screenshot(path=shots/"1_hostile.png", full_page=True)

    # the row above: buttons, number, slider by keyboard
    def button(name): return page.get_by_role("button", name=name, exact=True)
    button("next").click(); is_at(latent=1)
    button("previous").click(); is_at(latent=0)
    button("random").click(); expect(view).not_to_have_attribute("data-latent", "0")
    number = page.locator(".jr-root input[type=number]").first
    number.fill("7"); page.keyboard.press("Enter"); is_at(latent=7)
    expect(page.get_by_text("browse(stats, latent=7)")).to_be_visible()
    handle = page.locator(".jr-root .noUi-handle").first
    handle.scroll_into_view_if_needed(); handle.focus()
    for _ in range(3): page.keyboard.press("ArrowRight")
    is_at(latent=10)
    number.fill("9999"); page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("no latent 9999")
    number.fill("12"); page.keyboard.press("Enter"); is_at(latent=12)
    page.screenshot(path=shots/"2_latent.png", full_page=True)

    # contexts: other lists, widths, line breaks
    before = view.inner_html()
    button("by interval").click(); is_at(kind="strata"); assert view.inner_html() != before
    button("full").click(); is_at(width="full"); expect(page.locator(".jr .full").first).to_be_visible()
    page.get_by_text("line breaks").click(); expect(page.locator(".jr .full br").first).to_be_attached()
    page.screenshot(path=shots/"3_intervals.png", full_page=True)
    button("strongest").click(); button("16").click(); is_at(kind="top", width="16")

    # star, label, note
    button("☆ star").click(); expect(button("★ starred")).to_be_visible()
    label = page.get_by_placeholder("label of this latent")
    label.fill("<b>label</b>"); page.keyboard.press("Tab")
    expect(view).to_contain_text("★ <b>label</b>")
    assert '"12"' in (folder/"notes.json").read_text()

    # how long a switch takes, in the page: from the press of the button until the new latent has been painted
    took = [page.evaluate("""i => new Promise(done => {
        const next = [...document.querySelectorAll('button')].find(b => b.textContent.trim() === 'next'), start = performance.now()
        const look = () => document.querySelector(`[data-view=latent][data-latent='${i}']`) ? requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start))) : requestAnimationFrame(look)
        next.click(); look() })""", i) / 1000 for i in range(13, 33)]
    print(f"switch: median {statistics.median(took):.3f} s, max {max(took):.3f} s")

    # search, by keyboard alone
    button("search").focus(); page.keyboard.press("Space"); is_at(view="search")
    box = page.get_by_placeholder("search a token")
    box.fill("self"); page.keyboard.press("Enter"); is_at(hits=re.compile(r"[1-9]\d*"), query="self")
    page.screenshot(path=shots/"4_search.png", full_page=True)
    box.fill("<b>label"); page.keyboard.press("Enter"); is_at(hits=1)
    box.fill("<img src=x onerror='window.__xss=2'>"); page.keyboard.press("Enter"); is_at(view="search")
    box.fill("nothing like it"); page.keyboard.press("Enter"); is_at(hits=0)
    expect(view).to_contain_text("Nothing found")
    box.fill("self"); page.keyboard.press("Enter"); is_at(hits=re.compile(r"[1-9]\d*"), query="self")
    hit = page.locator(".jr-jumps button").first
    wanted = hit.inner_text(); hit.click(); is_at(view="latent", latent=wanted)

    # prompt
    button("prompt").click(); is_at(view="prompt")
    page.get_by_placeholder("type a prompt").fill("def close(self): <script>window.__xss=4</script>")
    button("read").click(); is_at(tokens=re.compile(r"[1-9]\d*"))
    page.locator(".jr-tokens button").nth(3).click(); is_at(position=3)
    button("effect").click(); is_at(by="effect")
    page.screenshot(path=shots/"5_prompt.png", full_page=True)
    page.get_by_placeholder("type a prompt").fill("x = 1\n" * 80); button("read").click()
    expect(page.get_by_role("alert")).to_contain_text("shorten it by")

    # steer
    button("steer").first.click(); is_at(view="steer")
    page.locator("button.mod-primary").click(); is_at(kl=re.compile(r"[\d.]+"))
    first = view.get_attribute("data-kl")
    strength = page.get_by_role("spinbutton", name="strength")
    strength.fill("1e30"); page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("choose a smaller value")
    strength.fill("3"); page.keyboard.press("Enter"); is_at(value="3")
    assert view.get_attribute("data-kl") != first
    page.screenshot(path=shots/"6_steer.png", full_page=True)

    for k, name in enumerate(("map", "compare", "training"), 7):
        button(name).click()
        expect(page.locator(f"[data-view={name}], [role=alert]").first).to_be_visible()
        page.screenshot(path=shots/f"{k}_{name}.png", full_page=True)
    outside = [u for u in page.urls if not re.match(r"(https?|wss?)://127\.0\.0\.1|data:|blob:", u) and not NOT_OURS.search(u)]
    assert not outside, outside
    assert not page.errs, page.errs
    assert page.evaluate("() => window.__xss ?? null") is None
    assert statistics.median(took) <= SWITCH_S, took
