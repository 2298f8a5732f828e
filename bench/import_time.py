"""What `import jumprelu_nb` costs, against `import torch`.

Every measurement is a fresh Python process; the contestants take turns, so that a busy moment hits all of them; the first round warms the
file cache and is not counted. Wall and processor time of the import alone, without the start of the interpreter. Target: `import jumprelu_nb`
costs at most 1.15 × `import torch`. The package loads its rooms on first use, so the first use is measured too.

    python bench/import_time.py --rounds 7"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median

from _common import argument_parser, report, root, spread

contestants = {
    "import torch": "import torch",
    "import jumprelu_nb": "import jumprelu_nb",
    "import jumprelu_nb, torch": "import jumprelu_nb, torch",
    "jumprelu_nb.SAE": "import jumprelu_nb; jumprelu_nb.SAE",
    "jumprelu_nb.LanguageModel": "import jumprelu_nb; jumprelu_nb.LanguageModel",
}
timed = "import time, json; w, c = time.perf_counter(), time.process_time(); {}; print(json.dumps([time.perf_counter()-w, time.process_time()-c]))"


def once(code:str) -> tuple[float, float]: # seconds of wall time, seconds of processor time
    "Time one import in a fresh process."
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", timed.format(code)], env=env, capture_output=True, text=True)
    if out.returncode: raise SystemExit(f"{code!r} failed:\n{out.stderr}")
    return tuple(json.loads(out.stdout.splitlines()[-1]))


def main() -> None:
    "Measure and report."
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default: 7)")
    args = parser.parse_args()
    wall, cpu = {n: [] for n in contestants}, {n: [] for n in contestants}
    for i in range(args.rounds + 1):
        for name, code in contestants.items():
            w, c = once(code)
            if i: wall[name].append(w); cpu[name].append(c)
    ratio = lambda t, name: round(median(a/b for a, b in zip(t[name], t["import torch"])), 4)
    others = [n for n in contestants if n != "import torch"]
    result = {"wall_seconds": {n: spread(t) for n, t in wall.items()}, "cpu_seconds": {n: spread(t) for n, t in cpu.items()},
              "wall_ratio_to_torch": {n: ratio(wall, n) for n in others}, "cpu_ratio_to_torch": {n: ratio(cpu, n) for n in others}}
    result["target"] = {"import jumprelu_nb / import torch": 1.15, "met": result["wall_ratio_to_torch"]["import jumprelu_nb"] <= 1.15}
    report("import_time", result, args)


if __name__ == "__main__": main()
