"""Loading a file of Gemma Scope's shape: how long, and how much memory, beside reading its bytes.

    python bench/load.py                                      # 16,384 x 2,304 float32, 302 MB
    python bench/load.py --latents 65536 --out bench/results/load.json

Every contestant runs in a process of its own, which first touches what it imports; the file is in the page cache. Time is the median of `--repeat` runs, memory the peak of the process above what it held before the last of them."""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import argument_parser, report, spread

CONTESTANTS = ("bytes", "bytes by np.fromfile", "load_sae", "load_sae of safetensors", "load_sae of safetensors, mapped", "load_sae to bfloat16", "numpy + copy")


def resident(key:str) -> int:
    "Kilobytes, from the system's account of this process."
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key + ":"))


def measure(what:str, path:Path, repeat:int) -> dict:
    "Time and peak memory of one way to load, in this process."
    import numpy as np
    import torch
    from jumprelu_nb.sae.model import SAE
    from jumprelu_nb.share.exchange import load_sae
    torch.set_num_threads(1)
    def numpy_copy():
        a, sae = dict(np.load(path)), SAE(2304, 1)
        sae = SAE(*a["W_enc"].shape)
        with torch.no_grad():
            for k in ("W_enc", "b_enc", "W_dec", "b_dec"): getattr(sae, k).copy_(torch.from_numpy(a[k]))
            sae.gate.set_threshold_(torch.from_numpy(a["threshold"]))
        return sae
    way = {"bytes": path.read_bytes, "load_sae": lambda: load_sae(path), "bytes by np.fromfile": lambda: np.fromfile(path, np.uint8), "load_sae of safetensors": lambda: load_sae(path.parent/"2"), "load_sae of safetensors, mapped": lambda: load_sae(path.parent/"2", mmap=True), "load_sae to bfloat16": lambda: load_sae(path, dtype=torch.bfloat16), "numpy + copy": numpy_copy}[what]
    tiny = path.parent/"tiny"/"params.npz"
    load_sae(tiny)                                # imports
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter(); got = way(); seconds.append(time.perf_counter() - start); del got
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")                            # forget the peak so far
    got = way()                                                              # held until the peak is read
    peak = resident("VmHWM") - base
    del got
    return dict(seconds=spread(seconds), memory_mb=round(peak / 1024, 1))


def main() -> None:
    p = argument_parser(__doc__)
    p.add_argument("--latents", type=int, default=16_384); p.add_argument("--width", type=int, default=2304); p.add_argument("--repeat", type=int, default=9)
    p.add_argument("--measure", help="(internal)"); p.add_argument("--path", type=Path, help="(internal)")
    a = p.parse_args()
    if a.measure: print(json.dumps(measure(a.measure, a.path, a.repeat))); return
    import numpy as np
    with tempfile.TemporaryDirectory() as folder:
        path, rng = Path(folder)/"params.npz", np.random.default_rng(0)
        for file, d, F in ((path, a.width, a.latents), (Path(folder)/"tiny"/"params.npz", 4, 8)):
            file.parent.mkdir(exist_ok=True)
            np.savez(file, W_enc=rng.standard_normal((d, F), dtype=np.float32), W_dec=rng.standard_normal((F, d), dtype=np.float32), b_enc=np.zeros(F, np.float32), b_dec=np.zeros(d, np.float32), threshold=np.ones(F, np.float32))
        from jumprelu_nb.share.exchange import load_sae, save_as
        save_as(load_sae(path), Path(folder)/"2", "gemma_scope_2")
        size = path.stat().st_size / 2**20
        found = {}
        for _ in range(2):                                                    # the second round counts: in the first the file enters the cache
            for what in CONTESTANTS:
                out = subprocess.run([sys.executable, __file__, "--measure", what, "--path", str(path), "--repeat", str(a.repeat)], stdout=subprocess.PIPE, text=True, check=True)
                found[what] = json.loads(out.stdout.splitlines()[-1])
    byte, quick = (found[k]["seconds"]["median"] for k in CONTESTANTS[:2])      # into pages of 4 KB, and into large ones
    for r in found.values(): r |= dict(time_ratio=round(r["seconds"]["median"] / byte, 2), time_ratio_to_fromfile=round(r["seconds"]["median"] / quick, 2), memory_ratio=round(r["memory_mb"] / size, 2))
    report("load", dict(file_mb=round(size, 1), **found), a)


if __name__ == "__main__": main()
