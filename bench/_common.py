"""What every benchmark writes beside its numbers: versions and the machine, without names of people or hosts.

    from _common import argument_parser, report
    args = argument_parser(__doc__).parse_args()
    report("import_time", {"ratio": 1.02}, args)        # prints JSON; with --out FILE also writes it"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

root = Path(__file__).resolve().parent.parent


def cores() -> int:
    "How many processor cores this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float|None:
    "Physical memory, where the system tells."
    try: return round(os.sysconf("SC_PAGE_SIZE")*os.sysconf("SC_PHYS_PAGES")/2**30, 1)
    except (AttributeError, ValueError, OSError): return None


def processor() -> str:
    "The model of the processor."
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"): return line.split(":", 1)[1].strip()
    except OSError: pass
    if sys.platform == "darwin": return subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    "Describe the machine: processor, cores, memory, load at this moment, accelerator if torch is loaded and sees one."
    out = {"processor": processor(), "cores": cores(), "memory_gb": memory_gb(), "system": f"{platform.system()} {platform.machine()}"}
    if hasattr(os, "getloadavg"): out["load_1min"] = round(os.getloadavg()[0], 2)
    torch = sys.modules.get("torch")
    if torch is not None:
        out["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available(): out["gpu"] = torch.cuda.get_device_name(0)
    return out


def versions(*names:str) -> dict[str, str|None]:
    "Versions of Python, of this library and of the distributions that decide its speed."
    out: dict[str, str|None] = {"python": platform.python_version()}
    for name in ("jumprelu_nb", "torch", "numpy", "transformers", "tokenizers", "datasets", *names):
        try: out[name] = version(name)
        except PackageNotFoundError: out[name] = None
    if out["jumprelu_nb"] is None: out["jumprelu_nb"] = source_version()
    return out


def source_version() -> str:
    "Our version, where the package runs from its folder without being installed."
    text = (root/"jumprelu_nb"/"__init__.py").read_text(encoding="utf-8")
    return next(l for l in text.splitlines() if l.startswith("__version__")).split('"')[1]


def commit() -> str|None:
    "The commit that was measured, with a + if the tree differs from it."
    git = lambda *a: subprocess.run(["git", *a], cwd=root, capture_output=True, text=True)
    head = git("rev-parse", "--short=12", "HEAD")
    if head.returncode: return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")


def argument_parser(doc:str|None) -> argparse.ArgumentParser:
    "A parser with the options that all benchmarks share."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    return parser


def spread(seconds:list[float]) -> dict[str, float]:
    "Median, best and worst of repeated timings."
    return {"median": round(median(seconds), 4), "min": round(min(seconds), 4), "max": round(max(seconds), 4), "n": len(seconds)}


def report(name:str, results:dict[str, Any], args:argparse.Namespace|None=None, packages:tuple[str, ...]=()) -> dict[str, Any]:
    "Print the results as JSON with the versions, the machine and the arguments beside them, and write them where `--out` says."
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"} if args else {}
    out = {"benchmark": name, "results": results, "arguments": given, "versions": versions(*packages), "commit": commit(), "machine": machine(),
           "date": time.strftime("%Y-%m-%d", time.gmtime())}
    text = json.dumps(out, indent=2, ensure_ascii=False) + "\n"
    print(text, end="")
    if args is not None and args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_name(args.out.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, args.out)
    return out
