"""What every page of the book keeps to: small, clean, told in prose, its exports documented.

Limits here are where a page is wrong; where it is beautiful is a narrower place (CONTRIBUTING.md, "What a page looks like")."""
import ast, json, re
import pytest
from _book import appendix, blob, body, code_cells, directives, exported, lib, module, nbs, notebook, pages, rooms, tree

each_page = pytest.mark.parametrize("page", pages())
each_room = pytest.mark.parametrize("room", list(rooms()))
KB = 1024


def outputs(page:str):
    for c in code_cells(page): yield from c.get("outputs", [])


def text(output) -> str: return json.dumps(output, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------ size and hygiene
@each_page
def test_small(page):
    assert (nbs/page).stat().st_size < 300*KB, "a page is under 300 KB"
    for o in outputs(page): assert len(text(o)) < 50*KB, f"an output is under 50 KB: {text(o)[:200]}"


@each_page
def test_no_plotly_library_inside(page):
    for o in outputs(page): assert not re.search(r"plotly\.js v\d|Plotly\.register", text(o)), "save with PLOTLY_RENDERER=notebook_connected"


@each_page
def test_clean(page):
    nb = notebook(page)
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 5)
    assert set(nb["metadata"]) <= {"kernelspec", "widgets"} and "kernelspec" in nb["metadata"], "run nbdev_clean; new texts begin with tools/nbheader.txt"
    for c in nb["cells"]:
        assert set(c["metadata"]) <= {"hide_input"}
        assert c.get("execution_count") is None
        assert re.fullmatch(r"[\w-]{1,64}", c["id"])
        for o in c.get("outputs", []):
            assert o.get("execution_count") is None
            assert o["output_type"] != "error", f"a saved traceback: {text(o)[:300]}"
    assert len({c["id"] for c in nb["cells"]}) == len(nb["cells"])


private = re.compile(r"""(?<![\w.])(/(home|root|Users|work|tmp|opt|mnt|data|private|var/folders)/[\w.-]+|[A-Z]:\\\\)|[\w./]/site-packages|site-packages/|/lib/python3""")
secret = re.compile(r"hf_[A-Za-z0-9]{20}|gh[pousr]_[A-Za-z0-9]{20}|github_pat_|sk-[A-Za-z0-9]{20}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY")


@each_page
def test_nothing_private(page):
    for o in outputs(page):
        m = private.search(text(o))
        assert not m, f"a path of somebody's machine in an output: …{text(o)[max(0, m.start()-80):m.end()+40]}…"
    whole = (nbs/page).read_text(encoding="utf-8")
    assert not secret.search(whole), "this looks like a token"


@each_page
def test_no_progress_bars_saved(page):
    for o in outputs(page): assert not re.search(r"(?<!\\)\\r|it/s[,\]]|\d%\|", text(o)), f"a progress bar in a saved output: {text(o)[:200]}"


# ------------------------------------------------------------------------------------------------ shape
@each_page
def test_title_and_summary(page):
    first = notebook(page)["cells"][0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S.*\n\n> \S.*[^.\s]\s*$", first["source"]), "the first cell is `# title`, an empty line, `> one-line summary` without a full stop"
    if m := module(page): assert first["source"].split("\n")[0] == f"# {m.split('.')[-1]}"


@each_page
def test_colab_badge(page):
    badge = ("[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
             f"(https://colab.research.google.com/github/{blob.removeprefix('https://github.com/')}nbs/{page})")
    cells = notebook(page)["cells"]
    where = cells if page == "index.ipynb" else cells[1:2]
    assert any(badge in c["source"] for c in where if c["cell_type"] == "markdown"), f"the second cell is the badge: {badge}"
    assert not [l for c in cells for l in re.findall(r"colab\.research\.google\.com/github/\S+\.ipynb", c["source"]) if not l.endswith(f"/nbs/{page}")]


@each_page
def test_pip_only_in_the_colab_cell(page):
    for c in code_cells(page):
        if re.search(r"^\s*[!%]\s*pip\b", c["source"], re.M):
            assert directives(c).get("eval:") == "false" and "hide" in directives(c), "`!pip` stands in one hidden cell with `#| eval: false`"


@each_page
def test_imports_stand_alone(page):
    "The site runs every cell that imports; anything else in it would run there too (nbdev)"
    for c in code_cells(page):
        if directives(c).get("eval:") == "false" or re.search(r"^\s*[!%]", body(c), re.M): continue
        statements = ast.parse(body(c)).body
        is_import = lambda s: (isinstance(s, (ast.Import, ast.ImportFrom)) or isinstance(s, ast.If) and "TYPE_CHECKING" in ast.unparse(s.test)
                               or isinstance(s, ast.Try) and all(map(is_import, s.body)))
        if any(isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements):
            assert all(map(is_import, statements)), f"imports and other code in one cell:\n{body(c)[:400]}"
        else:
            nested = [s for s in statements if not isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.If))
                      and any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(s))]
            assert not nested or exported(c), f"an import inside a statement:\n{body(c)[:400]}"
        for s in ast.walk(ast.parse(body(c))):
            if isinstance(s, ast.ImportFrom) and (s.module or "").startswith("jumprelu_nb"): assert s.names[0].name != "*", "no star imports from our own rooms"
        assert not re.search(r"filterwarnings\(\s*['\"]ignore", c["source"]), "warnings are read, not silenced"


@each_page
def test_cells_are_short(page):
    for c in code_cells(page):
        lines = [l for l in body(c).splitlines() if l.strip()]
        if directives(c).get("eval:") == "false" or len(lines) <= 30: continue
        definitions = [s for s in ast.parse(body(c)).body if isinstance(s, (ast.FunctionDef, ast.ClassDef))]
        if len(lines) <= 45 and exported(c): continue   # a pair, or a definition and its constants
        assert exported(c), f"{len(lines)} lines in a cell that is not exported:\n{lines[0]}"
        assert len(definitions) == 1, f"an exported cell of {len(lines)} lines holds {len(definitions)} definitions, starting with\n{lines[0]}"


@each_room
def test_rooms_are_small(room):
    code = sum(len([l for l in body(c).splitlines() if l.strip()]) for c in code_cells(rooms()[room]) if exported(c))
    assert code <= 400, f"{room} exports {code} lines: split it by concept (aim at 300)"
    assert len(notebook(rooms()[room])["cells"]) <= 120, "split the page by concept (aim at 25 to 60 cells)"


@each_page
def test_told_in_prose(page):
    "Below two words of prose for five of code (comments aside) a page is a listing; aim at one for two and more"
    prose = sum(len(c["source"].split()) for c in notebook(page)["cells"] if c["cell_type"] == "markdown")
    code = sum(len(re.sub(r"(^|\s)#.*$", "", c["source"], flags=re.M).split()) for c in code_cells(page))
    assert prose >= (.3 if module(page) in appendix else .4)*code, f"{prose} words of prose for {code} of code"
    for c in notebook(page)["cells"]:
        if c["cell_type"] == "markdown": assert not re.search(r"\b[Ii]n this (cell|notebook),? we\b", c["source"]), c["source"]


@each_room
def test_a_figure_and_checks(room):
    cells = list(code_cells(rooms()[room]))
    assert any(re.search(r"\.show\(\)|<svg|image/png", c["source"] + text(c.get("outputs", []))) for c in cells), "a page has a figure worth looking at"
    assert any(re.search(r"\b(test_\w+|assert|expect_fail)\b", c["source"]) for c in cells if not exported(c)), "a page tests what it claims"
    assert any("test_fail(" in c["source"] or "expect_fail" in c["source"] or "pytest.raises" in c["source"] for c in cells), "a page shows one failure and its message"


# ------------------------------------------------------------------------------------------------ documentation of what is exported
protocol = {"__init__", "forward", "extra_repr", "state_dict", "load_state_dict", "device", "dtype"}   # PyTorch says what these do
functions = (ast.FunctionDef, ast.AsyncFunctionDef)


def decorators(node) -> set[str]: return {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}


def public(room:str):
    "Public functions, classes and methods of a room: (name, node, its class or None). A method that overrides one of the room's own keeps its contract."
    nodes = tree(lib/(room.replace(".", "/")+".py")).body
    classes = {n.name: n for n in nodes if isinstance(n, ast.ClassDef)}

    def inherited(c):
        for b in map(ast.unparse, c.bases):
            if b in classes: yield from {m.name for m in classes[b].body if isinstance(m, functions)} | set(inherited(classes[b]))
    for n in nodes:
        if not isinstance(n, (*functions, ast.ClassDef)) or n.name.startswith("_"): continue
        yield n.name, n, None
        if not isinstance(n, ast.ClassDef): continue
        known = set(inherited(n)) - {"__init__"}
        for m in n.body:
            if isinstance(m, functions) and m.name not in known and (m.name == "__init__" or not m.name.startswith("_")): yield f"{n.name}.{m.name}", m, n


@each_room
def test_docstrings(room):
    missing = [name for name, n, c in public(room) if not ast.get_docstring(n) and not (c and n.name in protocol)]
    assert not missing, f"without a docstring: {missing}"
    long = [name for name, n, _ in public(room) if not isinstance(n, ast.ClassDef) and (ast.get_docstring(n) or "").count("\n") > 3]
    assert not long, f"docstrings are one line; more goes into the text of the page: {long}"


@each_room
def test_docments(room):
    "Every parameter has a comment on its line that tells shape, unit or meaning (or the docstring names it in `backticks`), every result a type"
    lines = (lib/(room.replace(".", "/")+".py")).read_text(encoding="utf-8").splitlines()
    missing = []
    for name, n, c in public(room):
        doc = (ast.get_docstring(n) or "") + (ast.get_docstring(c) or "" if c else "")
        said = lambda p, name: re.search(r"#\s*\S", lines[p.end_lineno-1][p.end_col_offset:]) or re.search(rf"`{name}\b", doc)
        if isinstance(n, ast.ClassDef):
            if "dataclass" in decorators(n):
                missing += [f"{name}.{s.target.id}" for s in n.body if isinstance(s, ast.AnnAssign) and not s.target.id.startswith("_") and not said(s, s.target.id)]
            continue
        if decorators(n) & {"property", "setter", "overload", "cached_property"} or c and n.name in protocol - {"__init__", "forward"}: continue
        params = n.args.posonlyargs + n.args.args + n.args.kwonlyargs
        if c and "staticmethod" not in decorators(n): params = params[1:]
        missing += [f"{name}({p.arg})" for p in params if not said(p, p.arg)]
        gives = [m for m in ast.walk(n) if isinstance(m, ast.Return) and m.value is not None or isinstance(m, (ast.Yield, ast.YieldFrom))]
        if gives and n.returns is None: missing.append(f"{name} -> ?")
    assert not missing, "without a comment, or a result without a type:\n" + "\n".join(missing)
