"""How much memory a training step needs beyond parameters, gradients and moments, in units of one (batch × d_sae) float32 table.

    python bench/memory.py                                # d_in 512, d_sae 8192, batch 2048, L0 48
    python bench/memory.py --shape 512,8192,2048 512,16384,1024 --out bench/results/memory.json

Every contestant has a process of its own. There an SAE of the same size takes steps on an eighth of the batch first and is thrown away, so that code
is loaded and libraries have the buffers they keep; then the contestant is built, the system's record of the peak is reset, and a few steps are taken.
Counted is the peak of the resident memory in these steps, less what was there before the contestant was built, less its parameters, as much again for
gradients, and the optimizer's moments: whatever is left was needed by the step, wherever it was allocated. Batches and the dictionary from which they
were made were there before and do not count. Needs Linux.

The names for --only:"""
from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from pathlib import Path

import torch
from _common import argument_parser
from _peers import FURTHER, TITLES, TRAINING, Contestant, Problem, Shape, allocator_set, build, chosen, elsewhere, hand_over, listed, reported, title


def status(field:str) -> int:
    "Bytes of VmRSS or VmHWM of this process."
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"): return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def settle() -> None:
    "Give freed memory back to the system."
    gc.collect()
    try: ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError): pass


def reset_peak() -> bool:
    "Forget the peak so far."
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: return False
    return True


def standing(c:Contestant) -> tuple[int, int]:
    "Bytes of parameters, and of the optimizer's state."
    trainer = getattr(c, "trainer", None)
    opt = getattr(c, "opt", None) or getattr(trainer, "opt", None) or getattr(trainer, "optimizer", None)
    size = lambda t: t.numel() * t.element_size()
    found, state = {}, {}
    for o in (opt, getattr(opt, "optimizer", None), getattr(opt, "base", None)):
        if o is None: continue
        for g in o.param_groups:
            for q in g["params"]: found[q.data_ptr()] = size(q)
        for s in o.state.values():
            for t in (s.values() if isinstance(s, dict) else []):
                if torch.is_tensor(t) and t.dim(): state[t.data_ptr()] = size(t)
    return sum(found.values()), sum(v for k, v in state.items() if k not in found)


def measure(name:str, shape:Shape, steps:int) -> dict:
    "One contestant, in this process."
    torch.set_num_threads(1)
    few = Shape(shape.d_in, shape.d_sae, max(16, shape.batch // 8), shape.l0)
    q = Problem(few, batches=1)
    small = build(name, q)
    for _ in range(2): small.step(q.x[0])
    small.l0(q.x[0])
    del small, q; settle()
    p = Problem(shape, batches=1)
    p.W_T, p.x[0].sum()
    settle()
    before = status("VmRSS")
    c = build(name, p)
    settle()
    built, fresh = status("VmRSS"), reset_peak()
    for _ in range(steps): c.step(p.x[0])
    peak, (parameters, state) = status("VmHWM"), standing(c)
    l0 = c.l0(p.x[0])
    net, table = peak - before, 4 * shape.table
    mb = lambda n: round(n / 2**20, 1)
    return {"shape": shape.word, "name": name, "tables_beyond": round((net - 2 * parameters - state) / table, 3), "net_mb": mb(net), "parameters_mb": mb(parameters), "moments_mb": mb(state), "table_mb": mb(table),
            "built_mb": mb(built - before), "peak_was_reset": fresh, "allocator_setting": allocator_set(), "l0": None if l0 is None else round(l0, 1), **c.more(), **({"note": c.note} if c.note else {})}


def parser():
    names = [n for n in [*TITLES, *FURTHER] if n != "floor"]
    p = argument_parser((__doc__ or "") + listed(names))
    p.add_argument("--shape", type=Shape.read, nargs="+", default=[Shape(512, 8192, 2048)], help="d_in,d_sae,batch[,l0] (default: 512,8192,2048)")
    p.add_argument("--only", help="names, separated by commas")
    p.add_argument("--steps", type=int, default=4, help="steps during which the peak is taken (default: 4)")
    p.add_argument("--json-to", type=Path, help=argparse.SUPPRESS)
    return p


def main(words:list[str]|None=None) -> dict|None:
    "Measure and report."
    args = parser().parse_args(words)
    if not Path("/proc/self/status").exists(): raise SystemExit("This benchmark reads /proc/self/status: it needs Linux.")
    if args.json_to: return hand_over(args.json_to, measure(args.only, args.shape[0], args.steps))
    rows = []
    for s in args.shape:
        print(f"\n{s}: one table is {4 * s.table / 2**20:.0f} MB\n{'':46} {'tables':>8} {'net MB':>8} {'param. MB':>10} {'L0':>6}", file=sys.stderr)
        for name in chosen(args.only, TRAINING)[1:]:
            r = elsewhere(__file__, ["--shape", s.word, "--only", name, "--steps", str(args.steps)]) | {"shape": s.word, "name": name}
            rows.append(r)
            print(f"{title(name):46} dropped out: {r['error']}" if "error" in r else f"{title(name):46} {r['tables_beyond']:8.2f} {r['net_mb']:8.0f} {r['parameters_mb']:10.0f} {r['l0']:6}" + (f"  ({r['note']})" if r.get("note") else ""), file=sys.stderr)
    return reported("memory", {"rows": rows}, args, args.shape)


if __name__ == "__main__": main()
