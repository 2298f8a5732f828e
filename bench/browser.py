"""How quick the feature browser is, in a real browser, and how large the notebook with it.

    python bench/browser.py                               # 512 latents, 40 switches; needs chromium, playwright and voila
    python bench/browser.py --latents 16384 --tokens 50000 --out bench/results/browser.json
    python bench/browser.py --picture nbs/images/browser.png    # trains an SAE for some seconds and takes its picture

Voilà serves a notebook with `jr.browse(...)`, Chromium is driven through it. A switch is timed in the page, from the press of "next" until the
new latent is there and has been painted (two animation frames later). `draw` is the Python side alone: one press of the button without a kernel.
The notebook is executed with every tab opened once, with the widgets' state stored and without."""
from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from _common import argument_parser, report, root, spread

sys.path.insert(0, str(root/"tests"))


def parser() -> argparse.ArgumentParser:
    p = argument_parser(__doc__)
    p.add_argument("--latents", type=int, default=512)
    p.add_argument("--tokens", type=int, default=20_000, help="of text for the statistics")
    p.add_argument("--switches", type=int, default=40)
    p.add_argument("--picture", type=Path, help="only take a picture of the browser and write it here")
    return p


@contextmanager
def voila(notebook:Path):
    "Serve a notebook; gives its address."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    d = notebook.parent
    env = {**os.environ, "PYTHONPATH": str(root), "JUPYTER_CONFIG_DIR": str(d/"jcfg"), "IPYTHONDIR": str(d/"ipy"), "JUPYTER_PLATFORM_DIRS": "1", "HF_HUB_OFFLINE": "1"}
    with open(d/"voila.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "voila", notebook.name, "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"], cwd=d, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        for _ in range(300):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/voila/static/", timeout=5); break
            except urllib.error.HTTPError: break
            except OSError: time.sleep(.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)


def chromium() -> str:
    "Where it is."
    chrome = os.environ.get("CHROMIUM") or next((p for x in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(x))), None)
    if chrome is None: sys.exit("browser: no chromium here; install it, or name one with CHROMIUM=…")
    return chrome


@contextmanager
def opened(folder:Path, latent:int, size:tuple[int, int]=(1280, 1000)):
    "A page with the browser on it, not yet loaded, and its address."
    import nbformat as nbf
    from playwright.sync_api import sync_playwright
    code = f"import jumprelu_nb as jr\njr.browse('.', lm='embedded', latent={latent})"
    nbf.write(nbf.v4.new_notebook(cells=[nbf.v4.new_code_cell(code)], metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))), folder/"browser.ipynb")
    with voila(folder/"browser.ipynb") as url, sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"])
        try: yield b.new_page(viewport=dict(zip(("width", "height"), size))), url
        finally: b.close()


def picture(path:Path) -> None:
    "Train an SAE, choose a latent by rule, photograph its card."
    import jumprelu_nb as jr
    from jumprelu_nb.data.text import texts
    lm = jr.LanguageModel.load("embedded", device="cpu")
    x = jr.Activations.from_lm(lm, "resid_post.2", text=list(texts("stdlib"))[::40], split=None).sample(75_000)
    with tempfile.TemporaryDirectory() as folder:
        sae = jr.train(x, d_sae=512, l0=16, tokens=480_000, batch_size=1024, progress=False).sae
        sae.metadata.update(model_name="embedded", site="resid_post.2")
        stats = jr.LatentStats.collect(sae, lm, tokens=60_000)
        sae.save(folder); stats.save(folder)
        latent = max(stats.interesting(12)[:4], key=lambda i: float(stats.frequency[i]))
        with opened(Path(folder), latent, (1230, 790)) as (page, url):
            page.goto(url, wait_until="domcontentloaded")
            page.wait_for_selector(f"[data-view=latent][data-latent='{latent}']", timeout=120_000)
            page.wait_for_timeout(500)
            page.screenshot(path=path, clip=dict(x=10, y=14, width=1210, height=770))


def switches(folder:Path, n:int) -> dict:
    "Press next n times, in Chromium."
    with opened(folder, 0) as (page, url):
        t = time.perf_counter()
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_selector("[data-view=latent][data-latent='0']", timeout=120_000)
        first, out = time.perf_counter() - t, []
        switch = """i => new Promise(done => {
            const next = [...document.querySelectorAll('button')].find(b => b.textContent.trim() === 'next'), start = performance.now()
            const look = () => document.querySelector(`[data-view=latent][data-latent='${i}']`) ? requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - start))) : requestAnimationFrame(look)
            next.click(); look() })"""
        for i in range(1, n + 1):
            out.append(page.evaluate(switch, i) / 1000)
            time.sleep(.1)
    return dict(switch_s=spread(out), first_view_s=round(first, 2), chromium=subprocess.run([chromium(), "--version"], capture_output=True, text=True).stdout.split()[1])


def drawing(folder:Path, n:int) -> dict:
    "The Python side alone."
    import jumprelu_nb as jr
    b, out = jr.browse(folder, latent=0), []
    for _ in range(n):
        t = time.perf_counter()
        b.step(1)
        out.append(time.perf_counter() - t)
    return dict(draw_s=spread(out), view_kb=round(len(b.tab("latent").view.value) / 1000, 1), card_kb=round(len(b.to_html()) / 1000, 1))


def notebook_size(folder:Path) -> dict:
    "An executed notebook in which every tab was open once."
    import nbclient
    import nbformat as nbf
    os.environ["PYTHONPATH"] = str(root)
    code, out = f"import jumprelu_nb as jr\nb = jr.browse({str(folder)!r}, lm='embedded')\nfor t in ('prompt', 'search', 'map', 'steer', 'training', 'latent'): b.state.tab = t\nb", {}
    for stored in (True, False):
        nb = nbf.v4.new_notebook(cells=[nbf.v4.new_code_cell(code)], metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")))
        nbclient.NotebookClient(nb, timeout=300, store_widget_state=stored, resources=dict(metadata=dict(path=str(folder)))).execute()
        out["notebook_kb" if stored else "notebook_without_state_kb"] = round(len(nbf.writes(nb).encode()) / 1000, 1)
    return out


def main(argv:list[str]|None=None) -> dict:
    args = parser().parse_args(argv)
    if args.picture: return picture(args.picture) or {}
    from _workbench import make
    with tempfile.TemporaryDirectory() as folder:
        d = Path(folder)
        make(d, args.latents, args.tokens, hostile=False)
        return report("browser", drawing(d, args.switches) | switches(d, args.switches) | notebook_size(d), args, packages=("ipywidgets", "voila", "playwright"))


if __name__ == "__main__": main()
