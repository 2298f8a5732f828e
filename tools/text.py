"""The text form of every page, fresh from the notebooks:  python tools/text.py [--force]

nbs/sae/00_ste.ipynb becomes .nbtext/sae/00_ste.py, to be edited and written back by tools/sync.sh. Run it before editing and after every checkout,
merge or rebase. Texts with edits that never reached their notebooks are not dropped: it stops and names them, unless `--force` is given."""
from __future__ import annotations

import shutil
import sys
from pathlib import Path

import jupytext

root = Path(__file__).resolve().parent.parent
nbs, texts = root/"nbs", root/".nbtext"


def says(file:Path) -> list[tuple[str, str]]: # (kind of cell, its source) for every cell
    "What a page says, in either form."
    return [(c.cell_type, c.source.strip()) for c in jupytext.read(file).cells]


def edited() -> list[Path]: # texts, relative to the project
    "List the texts that say something else than their notebook."
    pairs = [(t, nbs/t.relative_to(texts).with_suffix(".ipynb")) for t in sorted(texts.rglob("*.py"))]
    return [t.relative_to(root) for t, n in pairs if not n.exists() or t.stat().st_mtime >= n.stat().st_mtime and says(t) != says(n)]


def main() -> None:
    "Write all texts anew."
    if "--force" not in sys.argv[1:] and (lost := edited()):
        names = "\n".join(f"  {t.as_posix()}" for t in lost)
        sys.exit(f"These texts hold edits that are not in their notebooks; write them back with tools/sync.sh, or drop them with --force:\n{names}")
    header = (root/"tools"/"nbheader.txt").read_text(encoding="utf-8").rstrip("\n") + "\n\n"
    shutil.rmtree(texts, ignore_errors=True)
    for n in sorted(nbs.rglob("*.ipynb")):
        if any(part.startswith(("_", ".")) for part in n.relative_to(nbs).parts): continue
        t = (texts/n.relative_to(nbs)).with_suffix(".py")
        t.parent.mkdir(parents=True, exist_ok=True)
        text = jupytext.writes(jupytext.read(n), fmt="py:percent")
        t.write_text(header + text.split("# ---\n", 2)[2].lstrip("\n"), encoding="utf-8")


if __name__ == "__main__": main()
