"A room imports only from its own chapter's earlier rooms and from chapters above; importing the package costs nothing."
import ast, json, subprocess, sys
import pytest
from _book import chapters, lib, module, pages, rooms, root, tree

floor = {m: i for i, m in enumerate(rooms())}
heavy = ["torch", "numpy", "transformers", "datasets", "huggingface_hub", "accelerate", "safetensors", "plotly", "pandas", "ipywidgets", "IPython", "fastcore", "typer"]


def imports(room:str) -> set[str]:
    "Modules of this package that a room imports, at whatever depth of its code."
    found, package = set(), room.split(".")[:-1]
    for n in ast.walk(tree(lib/(room.replace(".", "/") + ".py"))):
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = (["jumprelu_nb"] + package)[:len(package)+2-n.level] if n.level else []
            stem = ".".join(base + ([n.module] if n.module else []))
            names = [stem] + [f"{stem}.{a.name}" for a in n.names]   # `from ..sae import ste` names a module after `import`
        elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "jumprelu_nb":
            names = [f"jumprelu_nb.{public().get(n.attr, n.attr)}"]   # `import jumprelu_nb`, then `jumprelu_nb.SAE`
        else: continue
        found |= {m.removeprefix("jumprelu_nb.") for m in names if m.split(".")[0] == "jumprelu_nb"}
    return found & {*floor, *(m.split(".")[0] for m in floor)} - {room}


def public() -> dict[str, str]:
    "Public name → room."
    import jumprelu_nb as jr
    return jr._public


def test_chapters_are_known():
    "A new chapter has to take its place in the order"
    assert {m.split(".")[0] for m in floor} <= set(chapters), f"name the new chapter in tests/_book.py: {floor}"


@pytest.mark.parametrize("room", list(floor))
def test_imports_from_above(room):
    for m in imports(room):
        if m in floor: assert floor[m] < floor[room], f"{room} imports {m}, which stands below it"
        elif m == room.split(".")[0]: continue   # its own package
        else: pytest.fail(f"{room} imports the package {m!r}: import from the room itself, `from jumprelu_nb.sae.ste import …`")


@pytest.mark.parametrize("page", [p for p in pages() if module(p)])
def test_page_stands_in_its_chapter(page):
    "nbs/sae/00_ste.ipynb exports to sae.ste: folder = chapter, name = room"
    folder, _, name = page.removesuffix(".ipynb").rpartition("/")
    want = name.split("_", 1)[1] if name[0].isdigit() else name
    assert module(page) == (f"{folder}." if folder else "") + want


def in_fresh_process(code:str):
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


def test_the_package_alone_is_light():
    got = in_fresh_process(f"import sys, json, jumprelu_nb; print(json.dumps([m for m in {heavy} if m in sys.modules]))")
    assert got == [], f"`import jumprelu_nb` pulls in {got}"


@pytest.mark.skipif("sae.model" not in floor, reason="no such room yet")
def test_the_sae_alone_is_light():
    "Whoever only uses an SAE pays for torch, not for language models, data sets or plots"
    got = in_fresh_process("import sys, json, jumprelu_nb; jumprelu_nb.SAE; "
                           f"print(json.dumps([m for m in {[h for h in heavy if h not in ('torch', 'numpy', 'safetensors')]} if m in sys.modules]))")
    assert got == [], f"`jumprelu_nb.SAE` pulls in {got}"


def test_public_names_resolve():
    "Every name in `__all__` can be had, and `dir` knows it"
    import importlib
    import jumprelu_nb as jr
    for name in jr.__all__:
        where = jr._public.get(name)
        if where and where not in floor: continue   # a room that is not built yet
        assert getattr(jr, name) is not None
        assert name in dir(jr)
        if where: assert getattr(importlib.import_module(f"jumprelu_nb.{where}"), name) is getattr(jr, name)
    with pytest.raises(AttributeError, match="no_such_name"): jr.no_such_name


@pytest.mark.parametrize("verb, room", [("train", "train.trainer"), ("evaluate", "evaluate.fidelity"), ("browse", "browse.browser")])
def test_chapters_that_are_verbs(verb, room):
    "`jr.train` is a folder of modules and can be called; its help is the function's"
    import inspect, importlib
    import jumprelu_nb as jr
    if room not in floor: pytest.skip("no such room yet")
    chapter, function = getattr(jr, verb), getattr(importlib.import_module(f"jumprelu_nb.{room}"), verb)
    assert callable(chapter) and inspect.ismodule(chapter)
    assert inspect.signature(chapter) == inspect.signature(function)
