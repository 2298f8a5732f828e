"The book as the tests see it: its pages, its modules and the order of its rooms."
from __future__ import annotations

import ast
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator

root = Path(__file__).resolve().parent.parent
nbs, lib = root/"nbs", root/"jumprelu_nb"

chapters = ["figures", "sae", "data", "train", "evaluate", "interpret", "browse", "share"]   # floor order; a room imports only from above
appendix = ["figures"]           # pages that draw for the others
blob = "https://github.com/jumprelu-nb/jumprelu_nb/blob/main/"


def pages() -> list[str]:
    "Paths of all notebooks, relative to `nbs/`."
    found = (p.relative_to(nbs) for p in nbs.rglob("*.ipynb"))
    return sorted(p.as_posix() for p in found if not any(part.startswith(("_", ".")) for part in p.parts))


@lru_cache(None)
def notebook(page:str) -> dict[str, Any]:
    "Read a page, with the source of every cell as one string."
    nb = json.loads((nbs/page).read_text(encoding="utf-8"))
    for c in nb["cells"]: c["source"] = "".join(c["source"])
    return nb


def code_cells(page:str) -> Iterator[dict[str, Any]]:
    return (c for c in notebook(page)["cells"] if c["cell_type"] == "code" and c["source"].strip())


def directives(cell:dict[str, Any]) -> dict[str, str]:
    "The `#| name value` lines of a cell: name → value."
    found = re.findall(r"^\s*#\|\s*(\S+)[ \t]*(.*)$", cell["source"], re.M)
    return {name: value.strip() for name, value in found}


def exported(cell:dict[str, Any]) -> bool: return bool(directives(cell).keys() & {"export", "exports", "exporti"})


def body(cell:dict[str, Any]) -> str:
    "The code of a cell without its directives."
    return "\n".join(l for l in cell["source"].splitlines() if not l.lstrip().startswith("#|"))


def module(page:str) -> str|None:
    "The module a page is exported to, like `sae.ste`."
    for c in code_cells(page):
        if name := directives(c).get("default_exp"): return name
    return None


def rooms() -> dict[str, str]:
    "Module → its page, in floor order: by chapter, then by the number in the notebook's name."
    found = {m: p for p in pages() if (m := module(p))}
    rank = lambda m: chapters.index(m.split(".")[0]) if m.split(".")[0] in chapters else len(chapters)
    return dict(sorted(found.items(), key=lambda x: (rank(x[0]), x[1])))


def tree(file:Path) -> ast.Module: return ast.parse(file.read_text(encoding="utf-8"))
