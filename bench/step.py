"""What one training step costs, in units of one dense encoder product: this library, its peers, and a plain-torch reference.

    python bench/step.py                                  # d_in 512, d_sae 8192, batch 1024, L0 48; one thread
    python bench/step.py --all --threads 1 2 --malloc both --out bench/results/step.json
                                                          # four shapes, both numbers of threads, with and without the allocator
                                                          # setting: about half an hour on two idle cores
    python bench/step.py --shape 512,16384,1024 --only ours,sl_jumprelu
    python bench/step.py --widths --out bench/results/step_widths.json
                                                          # growth with the dictionary, 4 k to 131 k latents at fixed L0
    python bench/step.py --dead .1                        # a tenth of the latents declared dead: auxiliary losses run

Run it with the interpreter of the environment that `python bench/peers.py` makes; elsewhere it measures ours and the floor.

All contestants of a table run in one process, in turns, in another order each round. A figure is the median over rounds of the ratio to the floor
of the same round: processor time of the process, and wall time, which counts with more than one thread. `--malloc on` runs everything with glibc
told to keep large blocks, which spares the peers most of their page faults. Every setting has a process of its own.

The names for --only:"""
from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from _common import argument_parser
from _peers import FURTHER, TITLES, TRAINING, Problem, Shape, allocator_set, build, chosen, listed, race, reported, rows_of, screens, show, speedups, tables_of

SHAPES = ["512,8192,1024", "256,8192,1024", "512,16384,1024", "1024,8192,1024"]
WIDTHS = [4096, 8192, 16384, 32768, 65536, 131072]
GROWING = ["ours_float32", "ours_screened", "ours_beta0_float32", "ours_beta0_screened", "ours_l0_float32", "ref_float32", "ref_screened"]


def measure(shape:Shape, args) -> dict:
    "One table: a shape in this process."
    torch.set_num_threads(args.threads[0])
    p = Problem(shape, args.dead)
    contestants, broken = {}, {}
    for name in chosen(args.only, GROWING if args.widths else TRAINING):
        try: contestants[name] = build(name, p)
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as e: broken[name] = {"error": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    times, errors = race(contestants, p.x, args.rounds, args.warm)
    rows = rows_of(contestants, times, errors, shape, p.x[0]) | broken
    if args.widths:                                                        # what is not the product, as difference in the same round
        from statistics import median
        for name in rows:
            if name != "floor" and "error" not in rows[name]: rows[name]["beyond_floor_ms"] = round(1e3 * median(a - b for a, b in zip(times[name].cpu, times["floor"].cpu)), 3)
    show(shape, rows, f"; threads {args.threads[0]}, allocator setting {'on' if allocator_set() else 'off'}" + (f", dead {args.dead:g}" if args.dead else ""))
    return {"shape": shape.word, "threads": args.threads[0], "allocator_setting": allocator_set(), "dead": args.dead, "load_before": load, "rounds": args.rounds, "screening_in_library": screens(), "rows": rows,
            "times_as_long_cpu": speedups(times, errors), "times_as_long_wall": speedups(times, errors, "wall")}


def best_of_both(tables:list[dict]) -> list[dict]:
    "Where both allocator settings were measured: each peer with the setting that helps it, over ours without it; ratios to the floor of its own run."
    out = []
    for off in tables:
        on = next((t for t in tables if t.get("allocator_setting") and all(t.get(k) == off.get(k) for k in ("shape", "threads", "dead"))), None)
        if off.get("allocator_setting") or on is None or "rows" not in on or "rows" not in off: continue
        key = "x_floor" if off["threads"] == 1 else "x_floor_wall"
        get = lambda t, n: t["rows"].get(n, {}).get(key)
        ours, theirs = [n for n in off["rows"] if n.startswith("ours") and get(off, n)], [n for n in off["rows"] if not n.startswith("ours") and n != "floor" and get(off, n) and get(on, n)]
        out.append({"shape": off["shape"], "threads": off["threads"], "dead": off["dead"], "times_as_long": {o: {n: round(min(get(off, n), get(on, n)) / get(off, o), 2) for n in theirs} for o in ours}})
    return out


def growth(tables:list[dict]) -> dict:
    "What the narrowest and the widest dictionary cost beyond the product."
    tables = sorted((t for t in tables if "rows" in t), key=lambda t: Shape.read(t["shape"]).d_sae)
    names = [n for n in (tables[0]["rows"] if tables else []) if n != "floor" and all("beyond_floor_ms" in t["rows"].get(n, {}) for t in tables)]
    return {n: {"beyond_floor_ms": {Shape.read(t["shape"]).d_sae: t["rows"][n]["beyond_floor_ms"] for t in tables}, "x_floor": {Shape.read(t["shape"]).d_sae: t["rows"][n]["x_floor"] for t in tables},
                "grows_by": round(tables[-1]["rows"][n]["beyond_floor_ms"] / tables[0]["rows"][n]["beyond_floor_ms"], 2) if tables[0]["rows"][n]["beyond_floor_ms"] > 0 else None} for n in names}


def parser():
    p = argument_parser((__doc__ or "") + listed([*TITLES, *FURTHER]))
    p.add_argument("--shape", type=Shape.read, nargs="+", help=f"d_in,d_sae,batch[,l0] (default: {SHAPES[0]})")
    p.add_argument("--all", action="store_true", help=f"the shapes {' '.join(SHAPES)}")
    p.add_argument("--widths", action="store_true", help=f"d_in 256, batch 512, L0 48, d_sae {', '.join(map(str, WIDTHS))}: ours, the reference and the floor")
    p.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of threads, each in a process of its own (default: 1)")
    p.add_argument("--malloc", nargs="?", const="on", default="off", choices=["off", "on", "both"], help="run with glibc's thresholds raised so that large blocks are kept (default: off)")
    p.add_argument("--only", help="names, separated by commas; the floor always runs")
    p.add_argument("--rounds", type=int, default=7, help="timed rounds (default: 7)")
    p.add_argument("--warm", type=int, default=3, help="rounds before them (default: 3)")
    p.add_argument("--dead", type=float, default=0., help="share of the latents declared dead; those who have an auxiliary loss then compute it, ours AuxK (default: 0)")
    p.add_argument("--json-to", type=Path, help=argparse.SUPPRESS)
    return p


def main(words:list[str]|None=None) -> dict|None:
    "Measure and report."
    args = parser().parse_args(words)
    shapes = [Shape(256, m, 512) for m in WIDTHS] if args.widths and not args.shape else args.shape or [Shape.read(t) for t in (SHAPES if args.all else SHAPES[:1])]
    tables = tables_of(__file__, measure, args, shapes, GROWING if args.widths else TRAINING, further=("--dead", str(args.dead), *(["--widths"] if args.widths else [])), dead=args.dead)
    if tables is None: return None
    results = {"tables": tables, "peers_at_their_best": best_of_both(tables)} | ({"growth": growth(tables)} if args.widths else {})
    return reported("step", results, args, shapes)


if __name__ == "__main__": main()
