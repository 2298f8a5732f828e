"""What the one-file export of an SAE weighs, and how soon it can be used.

    python bench/export.py                                                 # 16,384 latents on the embedded model, 300,000 tokens of the standard library
    python bench/export.py --stats FOLDER --out bench/results/export.json  # of statistics that are there already
    python bench/export.py --picture nbs/images/export.png                 # trains the SAE of the tutorial and takes its picture

The contexts are real: the embedded model reads the standard library. The dictionary is a random one around the mean of the activations, with the threshold that gives the wanted L0 (as in
bench/latents.py); its latents are less selective than trained ones, so their contexts repeat themselves less and compress worse. The file is opened by Chromium from disk with an empty cache, every
time in a new window: *ready* is the time from the request to the first latent on the screen with the list of all beside it, *switch* from a key to the next latent on the screen, *search* from a
query to the list."""
from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
import zlib
from base64 import b64decode
from pathlib import Path
from statistics import median

from _common import argument_parser, report
from latents import made

from jumprelu_nb.browse.export import export_html
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.interpret.latents import LatentStats
from jumprelu_nb.train.trainer import train


def chromium() -> str:
    "The browser of this machine."
    return os.environ.get("CHROMIUM") or next(p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n)))


def picture(to:Path) -> None:
    "Train the SAE of nbs/tutorials/03_browser, export it, and photograph its latent of the word not, found by a search."
    from playwright.sync_api import sync_playwright
    lm = LanguageModel.load("embedded")
    sae = train(lm, "resid_post.1", d_sae=512, l0=16, tokens=250_000, batch_size=512, progress=False).sae
    stats = LatentStats.collect(sae, lm, tokens=200_000)
    latent = max(stats.latents_of(" not"), key=lambda x: (x[2], x[1]))[0]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        path = export_html(stats, Path(folder)/"features.html", sae=sae, notes={latent: dict(label="negation, the word not", star=True)})
        browser = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport=dict(width=1240, height=800))
        page.goto(f"{path.as_uri()}#f={latent}"); page.wait_for_selector(f'[data-latent="{latent}"]')
        page.fill("#jr-query", " not"); page.wait_for_timeout(300); page.keyboard.press("Escape"); page.keyboard.press("2")
        page.screenshot(path=to)
        browser.close()


def in_chromium(path:Path, repeat:int) -> dict:
    "Open the file, walk, search."
    from playwright.sync_api import sync_playwright
    ready, switch, search, asked, memory = [], [], [], set(), 0
    painted = "new Promise(r=>requestAnimationFrame(()=>setTimeout(r)))"
    with sync_playwright() as p:
        for _ in range(repeat):
            browser = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"])
            page = browser.new_page(viewport=dict(width=1280, height=900))
            page.on("request", lambda r: asked.add(r.url))
            start = time.perf_counter()
            page.goto(path.as_uri(), wait_until="commit"); page.wait_for_selector("body[data-ready='1'] [data-latent]"); page.evaluate(painted)
            ready.append(time.perf_counter() - start)
            for _ in range(20): switch.append(page.evaluate(f"(async()=>{{const s=performance.now();go(Math.floor(Math.random()*head.n));while(stage.firstChild.dataset.latent!==String(idOf(state.i)))await new Promise(r=>setTimeout(r));await {painted};return performance.now()-s}})()") / 1e3)
            for q in (" import", "self", "42", ""): search.append(page.evaluate(f"(async()=>{{const s=performance.now();state.query={q!r};search();await {painted};return performance.now()-s}})()") / 1e3)
            memory = max(memory, page.evaluate("performance.memory.usedJSHeapSize") / 2**20)
            version = browser.version
            browser.close()
    return dict(ready_s=round(median(ready), 3), ready_worst_s=round(max(ready), 3), switch_s=round(median(switch), 4), search_s=round(median(search), 4), heap_mb=round(memory), requests_beyond_the_file=len(asked) - 1, chromium=version)


def main(words:list[str]|None=None) -> dict|None:
    "Measure and report."
    p = argument_parser(__doc__)
    p.add_argument("--d-sae", type=int, default=16384)
    p.add_argument("--tokens", type=int, default=300_000)
    p.add_argument("--l0", type=float, default=64.)
    p.add_argument("--stats", type=Path, help="folder with statistics")
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--picture", type=Path, help="only take this picture")
    a = p.parse_args(words)
    if a.picture: picture(a.picture); return None
    del a.picture
    if a.stats: stats = LatentStats.load(a.stats)
    else:
        lm = LanguageModel.load("embedded")
        stats = LatentStats.collect(made(lm, "resid_post.2", a.d_sae, a.l0), lm, tokens=a.tokens)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = export_html(stats, Path(folder)/"features.html")
        took, size = time.perf_counter() - start, path.stat().st_size
        data = dict(re.findall(r'id="jr-(\w+)">([^<]*)<', path.read_text(encoding="utf-8")))
        first = json.loads(zlib.decompress(b64decode(data["0"])))
        out = dict(latents=len(stats), tokens=stats.tokens, l0=round(float(stats.frequency.sum()), 1), alive=round(float(stats.alive.double().mean()), 3), bytes=size, bytes_per_latent=round(size / len(stats)), head_bytes=len(data["head"]),
                   contexts_per_latent=round(sum(len(x) for x in first["at"]) / len(first["at"]), 1), export_s=round(took, 1), browser=in_chromium(path, a.repeat))
    a.stats = None                                                             # whose folder that was does not matter
    return report("export", out, a, ("playwright",))


if __name__ == "__main__": main()
