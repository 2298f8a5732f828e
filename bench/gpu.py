"""One training step on a GPU, at sizes of a small language model: this library against SAELens, and where the time goes. One file, all sizes, within ten minutes.

    python bench/gpu.py --out gpu.json                    # d_in 2304, d_sae 16384 and 65536, batch 4096, L0 70
    python bench/gpu.py --shape 2304,16384,4096,70 --only ours,ours_screened,sl_autocast_compiled --seconds 200
    python bench/gpu.py --device cpu --tiny               # goes through all of it without a GPU; its figures mean nothing

It needs torch with CUDA, this folder and the package beside it. SAELens is measured where it is installed (`pip install sae-lens==6.54.12`), our Triton
kernels where the package has them and takes them.

Contestants run in turns, in another order each round; a figure is the median over rounds of the time between two CUDA events around a few steps, after
warm-up and compilation. Products in float32 are exact for names with float32, and TF32 for the others; autocast is bfloat16. Memory is the allocator's
peak in a step beyond parameters, gradients and moments. The file given by --out is written anew after every round and section, so that nothing is lost
when the time is over or a contestant fails. Sections: step (full training steps), equality (the same active latents as an exact product, the same
steps as autograd?), kernels (each with every block size it comes with), pieces (products, compaction, lists, Adam in plain torch, alone).

The names for --only:"""
from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))                # where the package is not installed

import torch
from _common import argument_parser
from _peers import Contestant, Ours, Problem, Reference, SAELens, Shape, bag, ends, keep_unfinished, listed, missing, places, reported, screens

SIZES = ["2304,16384,4096,70", "2304,65536,4096,70"]
NAMES = {"floor_bf16": "one dense product, bf16", "floor_tf32": "one dense product, TF32", "floor_float32": "one dense product, float32",
         "ours": "ours: practical, as it comes", "ours_float32": "ours: practical, exact float32", "ours_autocast": "ours: practical, autocast", "ours_list": "ours: practical, list", "ours_screened": "ours: practical, list, screened",
         "ours_topk": "ours: TopK, as it comes", "ours_kernels_bf16": "ours: Triton kernels, L0 penalty, bf16", "ours_kernels_tf32x3": "ours: Triton kernels, L0 penalty, 3 × TF32", "ours_kernels_float32": "ours: Triton kernels, L0 penalty, float32",
         "ref_list": "plain torch, list", "ref_screened": "plain torch, screened list",
         "sl_float32": "SAELens JumpReLU, float32", "sl_tf32": "SAELens JumpReLU, TF32", "sl_autocast": "SAELens JumpReLU, autocast", "sl_autocast_compiled": "SAELens JumpReLU, autocast, compiled"}


class Product(Contestant):
    "One dense product into memory that is already there."
    def __init__(self, p:Problem, dtype:torch.dtype):
        self.dtype, self.W, self.out = dtype, p.W_T.to(dtype), torch.empty(p.shape.batch, p.shape.d_sae, dtype=dtype, device=p.device)
        self.x = {x.data_ptr(): x.to(dtype) for x in p.x}
    def step(self, x): torch.mm(self.x[x.data_ptr()], self.W, out=self.out)


class Autocast(Contestant):
    "Somebody else's step under bfloat16 autocast."
    def __init__(self, c:Contestant, device:str): self.c, self.kind, self.note = c, torch.device(device).type, c.note
    def step(self, x):
        with torch.autocast(self.kind, torch.bfloat16): self.c.step(x)
    def l0(self, x):
        with torch.autocast(self.kind, torch.bfloat16): return self.c.l0(x)
    def more(self): return self.c.more()


def kernels_rooms(device:str):
    "The modules with the Triton kernels and with the step made of them, or why there are none to run."
    if importlib.util.find_spec("jumprelu_nb.sae.kernelstep") is None: return None, None, "this version of the library has no kernels"
    from jumprelu_nb.sae import kernels, kernelstep
    if not kernels.available(): return None, None, "Triton is not installed, or has nothing to compile for"
    if torch.device(device).type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1": return None, None, "on a CPU the kernels run with TRITON_INTERPRET=1 only"
    return kernels, kernelstep, ""


class Fused(Contestant):
    "`fused_step` of our Triton kernels with the L0 penalty, bandwidth and price of SAELens, β₁ = 0, and the counts of a training."
    def __init__(self, p:Problem, device:str, dtype:torch.dtype=torch.bfloat16, how:str="ieee", configs:dict|None=None, lr:float=1e-7):
        from jumprelu_nb.sae.gates import JumpReLUGate
        from jumprelu_nb.sae.model import SAE
        _, self.room, why = kernels_rooms(device)
        if self.room is None: raise RuntimeError(why)
        s = p.shape
        scale = torch.cat(p.x).square().sum(-1).mean().sqrt().item()
        self.sae = SAE(s.d_in, s.d_sae, JumpReLUGate(s.d_sae, threshold=p.theta / scale, bandwidth=.05 / scale), scale=scale, pre_encoder_bias=True).to(device)
        with torch.no_grad(): self.sae.W_enc.copy_(p.W_T); self.sae.W_dec.copy_(p.W)
        self.moments, self.price, self.lr, self.how, self.configs = self.room.Moments(self.sae, (0., .999), dtype=dtype), 1e-4 / scale**2, lr, how, configs
        self.capacity = 2 * s.batch * s.l0
        self.silent, self.sums = torch.zeros(s.d_sae, device=device), torch.zeros(2, device=device)

    def step(self, x):
        r = self.report = self.room.fused_step(self.sae, self.moments, x / self.sae.scale, self.price, self.lr, .1 * self.lr, self.capacity, precision=self.how, configs=self.configs)
        self.silent = torch.where(r.fires > 0, 0., self.silent + len(x)); self.sums += torch.stack((r.error, r.l0))

    def l0(self, x): self.step(x); return float(self.report.l0)
    def more(self): return {"listed": int(self.report.count), "overflow": bool(self.report.overflow)}


def precision(name:str) -> None: torch.set_float32_matmul_precision("highest" if "float32" in name else "high")


class Bench:
    "What all sections share: the device, the deadline and the file."
    def __init__(self, args):
        self.args, self.device, self.cuda = args, args.device, torch.device(args.device).type == "cuda"
        self.end, self.results = time.monotonic() + args.seconds, {"sections": [], "failures": []}
        if self.cuda: self.results["gpu"] = {"name": torch.cuda.get_device_name(), "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1), "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count}
        self.results |= {"screening_in_library": screens(), "kernels_in_library": importlib.util.find_spec("jumprelu_nb.sae.kernelstep") is not None, "cuda": torch.version.cuda}

    def over(self) -> bool: return time.monotonic() > self.end
    def wait(self) -> None: torch.cuda.synchronize() if self.cuda else None

    def save(self) -> None: keep_unfinished("gpu", self.results, self.args.out)

    def failed(self, what:str, e:BaseException) -> str:
        said = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:300]}"
        self.results["failures"].append({"what": what, "error": said}); self.save()
        print(f"{what} failed: {said}", file=sys.stderr)
        return said

    def milliseconds(self, step, xs, n:int) -> tuple[float, float]:
        "Milliseconds per step on the device, and until the host had asked for all."
        self.wait()
        t = time.perf_counter()
        if self.cuda: a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2)); a.record()
        for i in range(n): step(xs[i % len(xs)])
        if self.cuda: b.record()
        host = time.perf_counter() - t
        self.wait()
        return (a.elapsed_time(b) if self.cuda else 1e3 * (time.perf_counter() - t)) / n, 1e3 * host / n

    def clean(self) -> None:
        gc.collect()
        if self.cuda: torch.cuda.empty_cache()


def makers(p:Problem, b:Bench) -> dict[str, Any]:
    "How each contestant is made; those of ours share one trainer, since they differ in how it is asked only."
    shared: list[Ours] = []
    def ours(**how):
        if not shared: shared.append(Ours(p, device=b.device))
        return shared[0].like(**how)
    on = dict(device=b.device)
    return {"floor_bf16": lambda: Product(p, torch.bfloat16), "ours_kernels_bf16": lambda: Fused(p, b.device), "ours_kernels_tf32x3": lambda: Fused(p, b.device, torch.float32, "tf32x3"), "ours": ours, "ours_list": lambda: ours(form="list"), "ours_screened": lambda: ours(form="list", screen="on"),       # the most important first: memory and time may end
            "sl_autocast_compiled": lambda: SAELens(p, "jumprelu", **on, autocast=True, compiled=True), "sl_autocast": lambda: SAELens(p, "jumprelu", **on, autocast=True),
            "ours_autocast": lambda: Autocast(ours(), b.device), "ref_list": lambda: Reference(p, **on), "ref_screened": lambda: Reference(p, True, **on), "sl_tf32": lambda: SAELens(p, "jumprelu", **on),
            "ours_float32": ours, "ours_kernels_float32": lambda: Fused(p, b.device, torch.float32), "sl_float32": lambda: SAELens(p, "jumprelu", **on), "ours_topk": lambda: Ours(p, "topk", **on), "floor_tf32": lambda: Product(p, torch.float32), "floor_float32": lambda: Product(p, torch.float32)}


def memory(c:Contestant, p:Problem, b:Bench) -> dict[str, float]:
    "Peak of a step beyond parameters, gradients and moments."
    if not b.cuda: return {}
    inner = getattr(c, "c", c)
    trainer = getattr(inner, "trainer", None)
    opt = getattr(inner, "opt", None) or getattr(trainer, "opt", None) or getattr(trainer, "optimizer", None)      # the kernels have none: they store no gradients
    size = lambda t: t.numel() * t.element_size()
    absent = sum(size(q) for g in opt.param_groups for q in g["params"] if q.grad is None) if opt else 0
    b.wait(); torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    c.step(p.x[0]); b.wait()
    beyond = torch.cuda.max_memory_allocated() - before - absent
    return {"memory_beyond_mb": round(beyond / 2**20, 1), "tables_beyond": round(beyond / (4 * p.shape.table), 3)}


def step(p:Problem, b:Bench, section:dict) -> None:
    "Full training steps, in turns."
    make, alive, rows = makers(p, b), {}, section["rows"]
    wanted = [n for n in (b.args.only.split(",") if b.args.only else make) if n != "floor_bf16"]
    for name in ["floor_bf16", *wanted]:
        if name.startswith("sl_") and "sae_lens" in missing(): continue
        if name == "ours_screened" and not screens(): rows[name] = {"skipped": "this version of the library has no screening"}; continue
        if "kernels" in name and (why := kernels_rooms(b.device)[-1]): rows[name] = {"skipped": why}; continue
        if name == "sl_autocast_compiled" and not b.cuda and not b.args.compile: rows[name] = {"skipped": "no compilation on a CPU without --compile"}; continue
        if b.over(): rows[name] = {"skipped": "out of time"}; continue
        precision(name)
        began = time.perf_counter()
        try:
            c = make[name]()
            for i in range(b.args.warm): c.step(p.x[i % len(p.x)])
            b.wait()
            rows[name] = {"ready_after_s": round(time.perf_counter() - began, 1), **memory(c, p, b)}
            alive[name] = c
        except Exception as e: c = None; rows[name] = {"error": b.failed(f"{name} at {p.shape}", e)}; b.clean()
        b.save()
    times: dict[str, list[float]] = {n: [] for n in alive}
    host: dict[str, list[float]] = {n: [] for n in alive}
    dice = random.Random(0)
    for _ in range(b.args.rounds):
        if b.over(): break
        order = list(alive); dice.shuffle(order)
        for name in order:
            precision(name)
            try:
                alive[name].step(p.x[0])
                ms, h = b.milliseconds(alive[name].step, p.x, b.args.inner)
                times[name].append(ms); host[name].append(h)
            except Exception as e: rows[name] = {"error": b.failed(f"{name} at {p.shape}", e)}; alive.pop(name); times.pop(name); b.clean()
        for name in alive:
            if not times[name]: continue
            ms = median(times[name])
            pairs = list(zip(times[name], times["floor_bf16"]))
            rows[name] |= {"ms": round(ms, 4), "ms_min": round(min(times[name]), 4), "rounds": len(times[name]), "host_ms": round(median(host[name]), 4), "x_floor": round(median(x / y for x, y in pairs), 3), "tokens_per_second": round(1e3 * p.shape.batch / ms)}
        section["times_as_long"] = {o: {n: round(median(x / y for x, y in zip(times[n], times[o])), 2) for n in alive if n.startswith(("sl_", "ref_")) and times[n]} for o in alive if o.startswith("ours") and times[o]}
        b.save()
    for name, c in alive.items():
        precision(name)
        try: l0 = c.l0(p.x[0]); rows[name] |= {"l0": None if l0 is None else round(l0, 1), **c.more(), **({"note": c.note} if c.note else {})}
        except Exception as e: b.failed(f"L0 of {name} at {p.shape}", e)


def pieces(p:Problem, b:Bench, section:dict) -> None:
    "What a step is made of, alone."
    s, x, W, rows, tf = p.shape, p.x[0], p.W, section["rows"], "high"
    table = x @ p.W_T
    mask = table > p.theta
    at = places(mask); r = at.div(s.d_sae, rounding_mode="floor"); c = at - r * s.d_sae; v = table.view(-1)[at]
    crow, order = ends(r, s.batch), torch.argsort(c); starts = ends(c[order], s.d_sae)[:-1]
    half, Wh = x.bfloat16(), p.W_T.bfloat16()
    P = [torch.nn.Parameter(torch.empty_like(W).copy_(W)) for _ in range(2)]
    for q in P: q.grad = torch.randn_like(q)
    adam, copied = torch.optim.Adam(P, lr=1e-6, fused=True), torch.empty_like(W)
    csr = torch.sparse_csr_tensor(crow, c, torch.zeros_like(v), (s.batch, s.d_sae), check_invariants=False)
    todo = {"product, bf16": lambda _: half @ Wh, "product, TF32": lambda _: x @ p.W_T, "product, float32": lambda _: x @ p.W_T, "compare": lambda _: table > p.theta, "places of the True entries": lambda _: places(mask),
            "decode the list": lambda _: bag(c, W, crow[:-1], v), "products at the list": lambda _: torch.sparse.sampled_addmm(csr, x, W.T, beta=0.), "order by latent": lambda _: torch.argsort(c),
            "gradient rows of one matrix": lambda _: bag(r[order], x, starts, v[order]), "decoder norms": lambda _: W.norm(dim=1), "fused Adam, both matrices": lambda _: adam.step(), "copy a matrix": lambda _: copied.copy_(W)}
    for name, run in todo.items():
        if b.over(): rows[name] = {"skipped": "out of time"}; continue
        torch.set_float32_matmul_precision("highest" if name.endswith("float32") else tf)
        try:
            for _ in range(3): run(x)
            ms = median(b.milliseconds(run, [x], b.args.inner)[0] for _ in range(b.args.rounds))
            rows[name] = {"ms": round(ms, 4)}
            if name.startswith("product,"): rows[name]["tflop_per_second"] = round(s.flop / ms / 1e9, 1)
            if name.startswith("fused"): rows[name]["gb_per_second"] = round(28 * 2 * W.numel() / ms / 1e6)
            if name.startswith("copy"): rows[name]["gb_per_second"] = round(8 * W.numel() / ms / 1e6)
        except Exception as e: rows[name] = {"error": b.failed(f"{name} at {s}", e)}; b.clean()
        b.save()
    section["entries"] = len(at)


def kernels(p:Problem, b:Bench, section:dict) -> None:
    "Our kernels one by one, with each of the block sizes they come with; then whole steps with the best."
    K, S, why = kernels_rooms(b.device)
    rows = section["rows"]
    if K is None: rows["all"] = {"skipped": why}; return
    M, best = p.shape.d_sae, {}
    def tried(key, name, candidates, run):
        for i, c in enumerate(candidates):
            if b.over(): break
            row = f"{name} {i}"
            try:
                began = time.perf_counter()
                for _ in range(2): run(c)
                b.wait()
                ready = time.perf_counter() - began
                ms = median(b.milliseconds(lambda _: run(c), p.x, b.args.inner)[0] for _ in range(b.args.rounds))
                rows[row] = {"ms": round(ms, 4), "config": c, "ready_after_s": round(ready, 1)}
                if key and ms < best.get(key, (9e9,))[0]: best[key] = ms, c
            except Exception as e: rows[row] = {"error": b.failed(f"{row} at {p.shape}", e), "config": c}; b.clean()
            b.save()
    def one(dtype, word, how):
        f = Fused(p, b.device, dtype, how)
        sae, low = f.sae, f.moments.low or dict(W_enc=f.sae.W_enc.detach(), W_dec=f.sae.W_dec.detach())
        x, limit = (p.x[0] / sae.scale).to(dtype), sae.gate.threshold.detach() - .5 * sae.gate.bandwidth
        tried("encode" if word == "bfloat16" else None, f"encode and compact, {word}", K.CONFIGS[f"encode_{word}"], lambda c: K.encode_compact(x, low["W_enc"], sae.b_enc.detach(), limit, f.capacity, how, c))
        if word == "float32": return
        s = K.encode_compact(x, low["W_enc"], sae.b_enc.detach(), limit, f.capacity, how, best["encode"][1] if "encode" in best else None)
        section["entries"] = int(s.count)
        e = K.sparse_decode(s.z, s.at, s.row_ptr, low["W_dec"], minus=x.float())
        g = e.to(dtype)
        tried("tokens", "decode", K.CONFIGS["tokens"], lambda c: K.sparse_decode(s.z, s.at, s.row_ptr, low["W_dec"], minus=x.float(), config=c))
        tried(None, "products at the list", K.CONFIGS["tokens"], lambda c: K.sampled_products(g, low["W_dec"], s.at, s.row_ptr, c))
        tried(None, "lists by latent", [None], lambda c: S.latent_lists(s, M))
        l = S.latent_lists(s, M)
        a = s.z.index_select(0, l.order)
        tried(None, "sums by latent", [None], lambda c: S.latent_sums(torch.stack([a] * 5), l))
        clock = f.moments.tick(torch.zeros((), dtype=torch.bool, device=b.device))
        tried("latents", "gradient rows and Adam", K.CONFIGS["latents"], lambda c: S.latent_rows(x, g, a, a, torch.zeros(M, device=b.device), l, sae.W_enc.detach(), sae.W_dec.detach(), f.moments, clock, 1e-9, None, c))
    for how in ((torch.bfloat16, "bfloat16", "ieee"), (torch.float32, "float32", "tf32x3")): one(*how); b.clean()
    section["best"] = {k: c for k, (_, c) in best.items()}
    for name, configs in (("whole step, as it comes", None), ("whole step, best block sizes", section["best"])):
        f = Fused(p, b.device, configs=configs)
        tried(None, name, [None], lambda c, f=f: f.step(p.x[0]))
        f = None; b.clean()


@torch.no_grad()
def equality(p:Problem, b:Bench, section:dict) -> None:
    "Does a list hold the same active latents with the same values as an exact product? Do the kernels take the same step as autograd?"
    from jumprelu_nb.sae.objectives import L0, update_
    from jumprelu_nb.sae.sparse import codes_of
    torch.set_float32_matmul_precision("highest")
    rows = section["rows"]
    sae = Ours(p, "l0", device=b.device).trainer.sae
    u = p.x[0] / sae.scale
    z, theta = u.double() @ sae.W_enc.double(), sae.gate.threshold.double()
    want, near = z > theta, (z - theta).abs() < 2e-6
    def compare(name, got):
        wrong = ((got != 0) != want) & ~near
        rows[name] = {"entries": want.numel(), "active": int(want.sum()), "differ": int(wrong.sum()), "within_2e-6_of_the_threshold": int(near.sum()), "largest_difference": float((got.double() - z)[(got != 0) & want].abs().max())}
    for name, how in (("list", {}), ("screened", {"screen": "on"})):
        if how and not screens(): rows[name] = {"skipped": "this version of the library has no screening"}; continue
        try:
            codes = codes_of(sae, u, "list", **how)
            compare(name, codes.table(codes.f))
        except Exception as e: rows[name] = {"error": b.failed(f"equality of {name} at {p.shape}", e)}
        b.save()
    K, _, why = kernels_rooms(b.device)
    for dtype, how in ((torch.float32, "ieee"), (torch.float32, "tf32x3"), (torch.bfloat16, "ieee")):
        name = f"kernels, {str(dtype).removeprefix('torch.')}, {how}"
        if K is None: rows[name] = {"skipped": why}; continue
        try:
            f = Fused(p, b.device, dtype, how, lr=1e-4)
            if dtype == torch.float32:
                s = K.encode_compact(u, f.sae.W_enc.detach(), f.sae.b_enc.detach(), f.sae.gate.threshold.detach(), f.capacity, how)
                got, n = torch.zeros_like(u @ f.sae.W_enc), int(s.count)
                got[s.rows[:n].long(), s.at[:n].long()] = s.z[:n]
                compare(name, got)
                del got
            twin, start = Fused(p, b.device, dtype, how, lr=1e-4).sae, {k: q.detach().clone() for k, q in f.sae.named_parameters()}
            gate = [q for n, q in twin.named_parameters() if n.startswith("gate.")]
            opt = torch.optim.Adam([dict(params=[q for n, q in twin.named_parameters() if not n.startswith("gate.")], lr=1e-4), dict(params=gate, lr=1e-5)], betas=(0., .999))
            with torch.enable_grad():
                for x in p.x: update_(twin, L0(f.price), opt, codes_of(twin, x / twin.scale, "table"), .5)
            for x in p.x: f.step(x)
            moved = {k: (q.detach() - start[k], t.detach() - start[k]) for (k, q), t in zip(f.sae.named_parameters(), twin.parameters())}
            rows.setdefault(name, {})["three_steps_relative_difference"] = {k: float(f"{float((m - t).norm() / t.norm().clamp_min(1e-30)):.2g}") for k, (m, t) in moved.items()}
            del f, twin, opt, moved
        except Exception as e: rows[name] = {"error": b.failed(f"{name} at {p.shape}", e)}
        b.clean(); b.save()


SECTIONS = {"step": step, "equality": equality, "kernels": kernels, "pieces": pieces}


def show(section:dict) -> None:
    "Print a section for the eye."
    print(f"\n{section['section']}: {section['shape']}", file=sys.stderr)
    for name, r in section["rows"].items():
        said = r.get("error") or r.get("skipped") or ", ".join(f"{k} {v}" for k, v in r.items() if v is not None)
        print(f"  {NAMES.get(name, name):44} {said}", file=sys.stderr)


def parser():
    p = argument_parser((__doc__ or "") + listed(list(NAMES)))
    p.add_argument("--shape", type=Shape.read, nargs="+", help=f"d_in,d_sae,batch,l0 (default: {' '.join(SIZES)})")
    p.add_argument("--tiny", action="store_true", help="two tiny shapes and one round, to go through the whole script")
    p.add_argument("--device", default="cuda", help="cuda, or cpu to try the script (default: cuda)")
    p.add_argument("--only", help="names of the step section, separated by commas; the bf16 product always runs")
    p.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), help="(default: all)")
    p.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    p.add_argument("--warm", type=int, default=5, help="steps before them (default: 5)")
    p.add_argument("--inner", type=int, default=5, help="steps between two events (default: 5)")
    p.add_argument("--seconds", type=float, default=540., help="start nothing new after so many seconds (default: 540)")
    p.add_argument("--compile", action="store_true", help="compile SAELens on a CPU too")
    return p


def main(words:list[str]|None=None) -> dict|None:
    "Measure and report."
    args = parser().parse_args(words)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here, so there is nothing to measure: run this on a machine with one, or with --device cpu --tiny to try the script.", file=sys.stderr)
        return None
    if args.tiny: args.rounds, args.warm, args.inner, args.shape = min(args.rounds, 2), 1, 1, args.shape or [Shape(32, 256, 64, 8), Shape(32, 512, 64, 8)]
    if unknown := [n for n in (args.only or "floor_bf16").split(",") if n not in NAMES]: raise SystemExit(f"There is no contestant {unknown[0]!r}: choose from {', '.join(NAMES)}.")
    b, shapes = Bench(args), args.shape or [Shape.read(t) for t in SIZES]
    if "sae_lens" in missing(): print("SAELens is not installed here, so its rows are missing (pip install sae-lens==6.54.12).", file=sys.stderr)
    problems = {}
    for name, shape in ((n, s) for n in SECTIONS if n in args.sections for s in shapes):                 # all sizes of the most important first
        if name == "equality" and shape.table > 2**27: continue                                         # needs float64 tables
        if b.over(): b.results["failures"].append({"what": f"{name} at {shape}", "error": "out of time"}); continue
        section = {"section": name, "shape": shape.word, "rows": {}}
        b.results["sections"].append(section)
        try:
            with contextlib.nullcontext() if name == "step" else torch.no_grad():
                if shape not in problems: problems[shape] = Problem(shape, device=args.device)
                SECTIONS[name](problems[shape], b, section)
        except Exception as e: b.failed(f"{name} at {shape}", e)
        b.clean(); b.save(); show(section)
    return reported("gpu", b.results, args, shapes)


if __name__ == "__main__": main()
