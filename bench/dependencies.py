"""How many distributions a user of the library gets beyond torch's own.

pip resolves `torch` alone and then this project, both from nothing, and says what it would install; nothing is installed. The difference is what
the library adds. The versions are those of constraints.txt; `--newest` takes the newest that fit (for torch on Linux, pip then downloads CUDA to
read its metadata). Without a network: `--installed` follows the metadata of what is installed in the running environment. Target: at most 60.

    python bench/dependencies.py"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

from _common import argument_parser, report, root


def normal(name:str) -> str: return re.sub(r"[-_.]+", "-", name).lower()


def resolved(requirement:str, tested:bool) -> dict[str, str]: # distribution → version
    "Ask pip what it would install for `requirement` into an empty environment."
    with tempfile.TemporaryDirectory() as tmp:
        answer = Path(tmp)/"report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(answer)]
        if tested: command += ["-c", str(root/"constraints.txt")]
        run = subprocess.run([*command, requirement], capture_output=True, text=True)
        if run.returncode: raise SystemExit(f"pip cannot resolve {requirement}:\n{run.stderr}")
        return {normal(i["metadata"]["name"]): i["metadata"]["version"] for i in json.loads(answer.read_text())["install"]}


def installed(requirements:list[str]) -> dict[str, str]: # distribution → version
    "Follow the metadata of what is installed here."
    from packaging.requirements import Requirement
    found, seen, todo = {}, set(), [Requirement(r) for r in requirements]
    while todo:
        r = todo.pop()
        extras = {"", *r.extras}
        if (key := (normal(r.name), frozenset(extras))) in seen: continue
        seen.add(key)
        d = distribution(r.name)
        found[normal(r.name)] = d.version
        todo += [q for q in map(Requirement, d.requires or []) if q.marker is None or any(q.marker.evaluate({"extra": e}) for e in extras)]
    return found


def declared() -> list[str]:
    "The run-time dependencies, as settings.ini and pyproject.toml declare them."
    text = (root/"settings.ini").read_text(encoding="utf-8")
    return re.search(r"^requirements = (.*)$", text, re.M)[1].split()


def main() -> None:
    "Count and report."
    parser = argument_parser(__doc__)
    parser.add_argument("--newest", action="store_true", help="resolve without constraints.txt")
    parser.add_argument("--installed", action="store_true", help="count in the running environment instead of asking pip")
    args = parser.parse_args()
    if args.installed: torch, ours = installed(["torch"]), installed(declared())
    else: torch, ours = resolved("torch", not args.newest), resolved(str(root), not args.newest)
    added = {n: v for n, v in sorted(ours.items()) if n not in torch and n != "jumprelu-nb"}
    report("dependencies", {"torch_alone": len(torch), "with_jumprelu_nb": len(torch.keys() | added.keys()), "added": len(added),
                            "target": {"added": 60, "met": len(added) <= 60}, "declared": declared(), "distributions_added": added}, args)


if __name__ == "__main__": main()
