"""Make the environment in which the benchmarks compare this library with others.

    python bench/peers.py                       # ~/.cache/jumprelu_nb/peers, a few minutes, about 2 GB with a CPU build of torch
    ~/.cache/jumprelu_nb/peers/bin/python bench/step.py

SAELens, sparsify and dictionary_learning are installed at fixed versions beside this library, so that ours and theirs run in one process,
in turns. The library itself needs none of them. torch comes first, so that no resolver picks another build. dictionary-learning is installed without its
dependencies: it pins an nnsight that brings diffusers and torchvision, and its trainers never call it (`bench/_peers.py` puts a stub in its place).
This library is installed in place (`pip install -e`): what is measured is the working tree."""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

root = Path(__file__).resolve().parent.parent
default = Path.home()/".cache"/"jumprelu_nb"/"peers"
torch = "torch==2.13.0"
peers = ["sae-lens==6.54.12", "eai-sparsify==1.3.3", "transformers==5.23.0"]
alone = ["dictionary-learning==0.1.0"]

wanted = """import json
from importlib.metadata import requires
print(json.dumps([r for r in requires("jumprelu_nb") or [] if "extra" not in r]))"""
found = """import json, sys
from importlib.metadata import version
sys.path.insert(0, sys.argv[1])
import _peers
print(json.dumps({"missing": _peers.missing(), **{n: version(n) for n in ("torch", "sae-lens", "eai-sparsify", "dictionary-learning", "transformers", "numpy", "jumprelu_nb")}}))"""


def main() -> None:
    "Make the environment, or complete it."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--venv", type=Path, default=default, help=f"folder of the environment (default: {default})")
    p.add_argument("--torch-index", help="where to find torch: https://download.pytorch.org/whl/cpu has the CPU build for Linux, which PyPI does not")
    p.add_argument("--quiet", action="store_true", help="only the last lines")
    a = p.parse_args()
    python = a.venv/("Scripts" if os.name == "nt" else "bin")/("python.exe" if os.name == "nt" else "python")
    if not python.exists(): venv.EnvBuilder(with_pip=True).create(a.venv)

    def ask(code:str, *words:str): return json.loads(subprocess.run([python, "-c", code, *words], cwd=a.venv, check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    def pip(*words:str):
        if subprocess.run([python, "-m", "pip", "install", *(["-q"] if a.quiet else []), *words], cwd=root).returncode:
            raise SystemExit(f"pip could not install {' '.join(words)}: see its message above; what is installed stays, and the same command goes on from here.")

    pip(torch, *(["--index-url", a.torch_index] if a.torch_index else []))
    pip(torch, *peers)
    pip("--no-deps", *alone)
    pip("--no-deps", "-e", str(root))
    pip(torch, peers[-1], "numba", *(r.split(";")[0].strip() for r in ask(wanted)))     # ours with all that makes it fast
    have = ask(found, str(root/"bench"))
    if have["missing"]: raise SystemExit(f"Installed, but not importable: {'; '.join(have['missing'])}.")
    print(", ".join(f"{k} {v}" for k, v in have.items() if k != "missing"))
    print(f"Run the benchmarks with {python}")


if __name__ == "__main__": sys.exit(main())
