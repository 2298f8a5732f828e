"""Real SAEs of the real libraries, there and back.

    python tests/interop/run.py                         # makes the environment if it is missing (a few minutes, about 2 GB), then compares
    python tests/interop/run.py --venv DIR --out FILE   # another place for the environment; the table as JSON

In an environment with SAELens, dictionary_learning and sparsify (`bench/peers.py` makes it and fixes the versions), SAEs of every architecture are made and trained for some steps *by these libraries*, saved by them,
loaded by them and by us, and run on the same inputs: the same latents have to be active, and codes and reconstructions may differ by 1e-6 of the largest number. Then SAEs that *we* trained go the other way."""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent.parent
default = Path.home()/".cache"/"jumprelu_nb"/"peers"


def main() -> int:
    "Make the environment, run `compare.py` in it."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--venv", type=Path, default=default, help=f"folder of the environment (default: {default})")
    p.add_argument("--torch-index", help="where to find torch, for bench/peers.py")
    p.add_argument("--out", type=Path, help="also write the table as JSON to this file")
    a = p.parse_args()
    python = a.venv/("Scripts" if os.name == "nt" else "bin")/("python.exe" if os.name == "nt" else "python")
    if not python.exists():
        made = subprocess.run([sys.executable, root/"bench"/"peers.py", "--venv", str(a.venv), "--quiet", *(["--torch-index", a.torch_index] if a.torch_index else [])])
        if made.returncode: return made.returncode
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))), WANDB_MODE="disabled", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    return subprocess.run([python, Path(__file__).with_name("compare.py"), *(["--out", str(a.out.resolve())] if a.out else [])], env=env, cwd=root).returncode


if __name__ == "__main__": sys.exit(main())
