"""The site without Quarto: nbdev's own doc stage succeeds on every page, every link leads somewhere, README tells what the index page tells.

A page that fails here would fail in the documentation's workflow too, where nbdev runs the same stage before Quarto."""
import importlib.util, json, os, re, subprocess, sys
from pathlib import Path
import pytest
from _book import blob, module, nbs, notebook, pages, rooms, root

each_page = pytest.mark.parametrize("page", pages())

spec = importlib.util.spec_from_file_location("preview", root/"tools"/"preview.py")
preview = importlib.util.module_from_spec(spec)
spec.loader.exec_module(preview)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    "The processed pages, and for each page what went wrong with it."
    proc = tmp_path_factory.mktemp("proc")
    code = ("import sys, json; sys.path.insert(0, sys.argv[1]); import preview; from pathlib import Path\n"
            "if __name__ == '__main__': print('\\n' + json.dumps(preview.process(Path(sys.argv[2]))))")
    script = tmp_path_factory.mktemp("script")/"stage.py"   # a file, because the stage spawns processes that import it
    script.write_text(code)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    run = subprocess.run([sys.executable, str(script), str(root/"tools"), str(proc)], cwd=root, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    failed = dict(f.split(": ", 1) for f in json.loads(run.stdout.splitlines()[-1]))
    return proc, failed


@pytest.fixture(scope="module")
def anchors(stage):
    "Page of the site → the anchors on it: headings, and the symbols documented there."
    found = {}
    for page in pages():
        if (stage[0]/page).exists():
            text = "\n".join(preview.markdown(preview.plain(stage[0]/page)))
            heads = re.findall(r"^#+\s+(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S|re.M), re.M)
            found[preview.page_path(Path(page)).as_posix()] = {slug(h) for h in heads} | {h.strip().lower() for h in heads}
    return found


def slug(heading:str) -> str:
    "The anchor that Quarto (pandoc) gives a heading."
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*$\\]", lambda m: m[1] or "", heading).lower()
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", plain).strip())


@each_page
def test_doc_stage(stage, page):
    proc, failed = stage
    assert page not in failed, failed.get(page)
    nb = preview.plain(proc/page)
    head = re.match(r"# (.*)\n\n> (.*)", notebook(page)["cells"][0]["source"])
    assert head, "the first cell is title and summary"
    title, summary = head.groups()
    assert nb.cells[0].source == f"# {title}\n\n> {summary}"
    want = [l for c in notebook(page)["cells"][1:] if c["cell_type"] == "markdown" for l in re.findall(r"^##+ .*[^-\s]$", c["source"], re.M)]
    got = [l for c in nb.cells if c.cell_type == "markdown" for l in c.source.splitlines() if l.startswith("##")]
    assert [preview.relink(g, lambda *_: "") for g in want] != [] or page == "index.ipynb", "a page has sections"
    assert len(got) == len(want), "every section reaches the site"


@each_page
def test_exports_are_documented(stage, page):
    "Every public function and class of the room has its signature table on the page, unless its cell is hidden"
    proc, failed = stage
    if page in failed or not (room := module(page)): pytest.skip("no room, or the doc stage failed")
    text = "\n".join(preview.markdown(preview.plain(proc/page)))
    hidden = "\n".join(c["source"] for c in notebook(page)["cells"] if re.search(r"^#\|\s*hide\s*$", c["source"], re.M))
    for name, where in symbols().items():
        if where[1] != f"jumprelu_nb/{room.replace('.', '/')}.py" or name.split(".")[-2] != room.split(".")[-1] or name.split(".")[-1].startswith("_"): continue
        short = name.split(".")[-1]
        if re.search(rf"^(def|class) {short}\b", hidden, re.M): continue
        assert re.search(rf"^#+ {short}$", text, re.M), f"{short} is exported but not shown"


def symbols() -> dict:
    "Full name → (page#anchor, file), from the index that nbdev exports."
    from jumprelu_nb._modidx import d
    return {name: where for names in d["syms"].values() for name, where in names.items()}


@each_page
def test_links_resolve(stage, anchors, page):
    "Backticked names, links between pages, links to files of the repository: all lead to something that is there"
    proc, failed = stage
    if page in failed: pytest.skip("the doc stage failed")
    here = preview.page_path(Path(page)).as_posix()
    for image, text, target in preview.links("\n\n".join(preview.markdown(preview.plain(proc/page)))): check(target, image, Path(page).parent, here, anchors)


def check(target:str, image:bool, folder:Path, here:str, anchors:dict) -> None:
    site = preview.site() + "/"
    raw = "https://raw.githubusercontent.com/jumprelu-nb/jumprelu_nb/main/"
    colab = "https://colab.research.google.com/github/" + blob.removeprefix("https://github.com/")
    path, _, anchor = target.partition("#")
    if target.startswith("#"): assert anchor.lower() in anchors[here], f"{here} has no section {anchor!r}"
    elif target.startswith(site) or target == site[:-1]:
        p = path[len(site):] or "index.html"
        assert p in anchors, f"{target}: no such page"
        assert not anchor or anchor.lower() in anchors[p], f"{target}: {p} has no {anchor!r}"
    elif target.startswith(blob): assert (root/path[len(blob):]).exists(), f"{target}: no such file"
    elif target.startswith((raw, colab)): assert (root/path[len(raw if path.startswith(raw) else colab):]).exists(), f"{target}: no such file"
    elif re.match(r"[a-z]+:|//|attachment:", target):
        assert not re.match(r"https?://github\.com/jumprelu-nb/(?!jumprelu_nb([/#]|$))|http://", target), f"{target}: not where we live"
    else:
        assert not image or folder == Path(".") or not path.startswith("/"), target
        file = Path(os.path.normpath(nbs/folder/path))
        p = preview.page_path(Path(os.path.normpath(folder/path))).as_posix()
        if path.endswith((".ipynb", ".html")):
            assert path.endswith(".ipynb"), f"{target}: link to the notebook (…/NN_room.ipynb), it works on GitHub, in Jupyter and on the site"
            assert file.exists() and p in anchors, f"{target}: no such page"
            assert not anchor or anchor.lower() in anchors[p], f"{target}: {p} has no {anchor!r}"
        else: assert file.exists(), f"{target}: no such file"


def test_backticked_names_of_ours_exist():
    "A name written as `jumprelu_nb.x.y` in the prose has to be one"
    names = set(symbols()) | {f"jumprelu_nb.{m}" for m in rooms()} | {f"jumprelu_nb.{m.split('.')[0]}" for m in rooms()}
    import jumprelu_nb as jr
    names |= {f"jumprelu_nb.{n}" for n in jr.__all__} | {"jumprelu_nb"}
    for page in pages():
        for c in notebook(page)["cells"]:
            if c["cell_type"] == "markdown":
                for n in re.findall(r"`(jumprelu_nb\.[\w.]+)(?:\(\))?`", c["source"]): assert n in names, f"nbs/{page} speaks of {n}"


def test_llms_txt_lists_every_page():
    text = (nbs/"llms.txt").read_text(encoding="utf-8")
    listed = {l for l in re.findall(rf"\({re.escape(preview.site())}/([^)#]*)\)", text)}
    site = {preview.page_path(Path(p)).as_posix() for p in pages()}
    assert listed <= site | {"", "index.html"}, f"nbs/llms.txt lists {listed - site}"
    assert site - {"index.html"} <= listed, f"nbs/llms.txt lacks {site - listed}"


# ------------------------------------------------------------------------------------------------ README.md
readme_exists = pytest.mark.skipif(not (nbs/"index.ipynb").exists() or not (root/"README.md").exists(), reason="no index page or README yet")


def words(text:str) -> str:
    "Markdown as a reader hears it: no links, no emphasis marks, single blanks."
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    while (new := re.sub(r"!?\[((?:[^\[\]])*)\]\([^()]*(?:\([^()]*\))?[^()]*\)", r"\1", text)) != text: text = new
    return re.sub(r"\s+", " ", text).strip()


@readme_exists
def test_readme_is_the_index_page():
    readme = (root/"README.md").read_text(encoding="utf-8")
    cells = notebook("index.ipynb")["cells"]
    fenced = re.compile(r"^```.*?^```\s*$", re.S|re.M)
    heads = lambda t: [words(l) for l in fenced.sub("", t).splitlines() if re.match(r"#+ ", l)]
    index = "\n\n".join(c["source"] for c in cells if c["cell_type"] == "markdown")
    assert heads(readme) == heads(index), "python tools/preview.py --readme"
    said = words(readme)
    for c in cells:
        hidden = re.search(r"^#\|\s*(hide|export|exporti|default_exp|echo:\s*false|include:\s*false)\b", c["source"], re.M)
        if c["cell_type"] == "code":
            code = "\n".join(l for l in c["source"].splitlines() if not l.startswith("#|")).strip()
            if not hidden and code and not re.match(r"[!%]", code): assert code in readme, f"README lacks a cell of the index page:\n{code}"
        else:
            for paragraph in re.split(r"\n\s*\n", c["source"]): assert words(paragraph) in said, f"README lacks a paragraph of the index page:\n{paragraph}"


@readme_exists
def test_readme_links_resolve(anchors):
    readme = (root/"README.md").read_text(encoding="utf-8")
    heads = {slug(h) for h in re.findall(r"^#+\s+(.*)$", re.sub(r"^```.*?^```", "", readme, flags=re.S|re.M), re.M)}
    for image, text, target in preview.links(readme):
        if target.startswith("#"): assert target[1:] in heads, target
        elif re.match(r"[a-z]+:|//", target): check(target, image, Path("."), "index.html", anchors)
        else: assert (root/target.partition("#")[0]).exists(), f"{target}: no such file"
    for target in re.findall(r"<img[^>]*\bsrc=\"([^\"]+)\"", readme): assert "://" in target or (root/target).exists(), f"{target}: no such file"


@readme_exists
def test_readme_has_the_two_commands():
    readme = (root/"README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", readme, re.S|re.M))
    for command in ("pip install -c constraints.txt . && jumprelu train", "pip install -c constraints.txt -e '.[dev]' && pytest"):
        assert any(l.strip() == command for l in blocks.splitlines()), f"README has the line {command}"
