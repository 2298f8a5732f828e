"""What encoding and decoding cost, in units of one dense encoder product: this library, its peers, and plain torch.

    python bench/inference.py                             # d_in 512, d_sae 8192, batch 1024, L0 48; one thread
    python bench/inference.py --shape 512,8192,1024 1024,8192,1024 --threads 1 2 --malloc both --out bench/results/inference.json
    python bench/inference.py --only ours,ours_screened,sl_jumprelu

All hold the same weights and see the same batches, without gradients, in turns, in another order each round; a figure is the median over rounds
of the ratio to the floor of the same round. Names that end in `_encode` stop at the latents: a table (batch × d_sae), or for ours_list_encode and
ours_screened_encode a list of the active ones. The others go on to the reconstruction. `difference` is the largest deviation from a dense
reconstruction, over tokens that have no pre-activation within 1e-4 of its threshold. Peers need the environment that `python bench/peers.py` makes.

The names for --only:"""
from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch
from _common import argument_parser
from _peers import ALLOCATOR, TITLES, Contestant, Floor, Problem, Screen, Shape, allocator_set, bag, chosen, ends, listed, places, race, reported, rows_of, screens, show, speedups, stub_nnsight, tables_of

NAMES = {"ours": "ours: sae(x)", "ours_encode": "ours: sae.encode(x), a table", "ours_list": "ours: list, float32", "ours_list_encode": "ours: list, float32, encode", "ours_screened": "ours: list, screened", "ours_screened_encode": "ours: list, screened, encode",
         "ref_dense": "plain torch, dense, in place", "ref_list": "plain torch, list", "ref_screened": "plain torch, screened list",
         "sl_jumprelu": "SAELens JumpReLU", "sl_jumprelu_encode": "SAELens JumpReLU, encode", "sl_topk": "SAELens TopK", "sl_topk_encode": "SAELens TopK, encode",
         "dl_jumprelu": "dictionary_learning JumpReLU", "dl_jumprelu_encode": "dictionary_learning JumpReLU, encode", "dl_topk": "dictionary_learning TopK", "dl_batchtopk": "dictionary_learning BatchTopK (threshold)", "dl_gated": "dictionary_learning Gated",
         "sp_topk": "sparsify TopK", "sp_topk_encode": "sparsify TopK, encode"}


class Fn(Contestant):
    "A function of a batch."
    def __init__(self, f, l0=None, note=""): self.f, self.count, self.note = f, l0, note
    def step(self, x): self.f(x)
    def l0(self, x): return self.count(x) if self.count else None


def nonzero(table) -> float: return (table != 0).sum(1).float().mean().item()


def ours(p:Problem) -> dict[str, Contestant]:
    "The public calls, and the list with and without screening."
    from jumprelu_nb.sae.gates import JumpReLUGate
    from jumprelu_nb.sae.model import SAE
    from jumprelu_nb.sae.sparse import decode_sparse, encode_sparse
    s = p.shape
    sae = SAE(s.d_in, s.d_sae, JumpReLUGate(s.d_sae, threshold=p.theta))
    sae.W_enc.copy_(p.W_T); sae.W_dec.copy_(p.W)
    sae.requires_grad_(False).eval()
    def encode(screen): return lambda x: encode_sparse(sae, x, screen)
    out = {"ours": Fn(sae, lambda x: nonzero(sae.encode(x))), "ours_encode": Fn(sae.encode, lambda x: nonzero(sae.encode(x)))}
    for name, screen in (("list", "off"), ("screened", "on")):
        out[f"ours_{name}"] = Fn(lambda x, screen=screen: decode_sparse(sae, encode_sparse(sae, x, screen)), lambda x, screen=screen: len(encode_sparse(sae, x, screen).values) / len(x))
        out[f"ours_{name}_encode"] = Fn(encode(screen), None)
    return out


def reference(p:Problem) -> dict[str, Contestant]:
    "Plain torch."
    s, W, out, theta = p.shape, p.W, torch.empty(p.shape.batch, p.shape.d_sae), p.theta
    def dense(x):
        f = torch.mm(x, p.W_T, out=out); f *= f > theta
        return f @ W
    def listed(x):
        z = torch.mm(x, p.W_T, out=out)
        at = places(z > theta); r = at.div(s.d_sae, rounding_mode="floor")
        return bag(at - r * s.d_sae, W, ends(r, len(x))[:-1], z.view(-1)[at])
    screen = Screen(s.batch, s.d_sae, s.d_in).weights(W, torch.zeros(s.d_sae), torch.full((s.d_sae,), theta))
    def screened(x):
        r, c, v = screen(x)
        return bag(c, W, ends(r, len(x))[:-1], v)
    return {"ref_dense": Fn(dense), "ref_list": Fn(listed, lambda x: (x @ p.W_T > theta).sum(1).float().mean().item()), "ref_screened": Fn(screened, lambda x: len(screen(x)[0]) / len(x))}


def saelens(p:Problem) -> dict[str, Contestant]:
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
    s = p.shape
    base = dict(d_in=s.d_in, d_sae=s.d_sae, dtype="float32", device="cpu")
    j, t = JumpReLUSAE(JumpReLUSAEConfig(**base)), TopKSAE(TopKSAEConfig(**base, k=s.l0))
    for m in (j, t): m.W_dec.data, m.W_enc.data = p.W, p.W_T
    j.threshold.data.fill_(p.theta)
    return {f"sl_{n}{w}": Fn(f, lambda x, m=m: nonzero(m.encode(x))) for n, m in (("jumprelu", j), ("topk", t)) for w, f in (("", m), ("_encode", m.encode))}


def dictionary_learning(p:Problem) -> dict[str, Contestant]:
    stub_nnsight()
    from dictionary_learning.dictionary import GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    s, out = p.shape, {}
    j = JumpReluAutoEncoder(s.d_in, s.d_sae); j.W_dec.data, j.W_enc.data = p.W, p.W_T; j.threshold.data.fill_(p.theta)
    out["dl_jumprelu"], out["dl_jumprelu_encode"] = (Fn(f, lambda x: nonzero(j.encode(x))) for f in (j, j.encode))
    for name, m in (("topk", AutoEncoderTopK(s.d_in, s.d_sae, s.l0)), ("batchtopk", BatchTopKSAE(s.d_in, s.d_sae, s.l0)), ("gated", GatedAutoEncoder(s.d_in, s.d_sae))):
        m.decoder.weight.data, m.encoder.weight.data = p.W_T, p.W
        if name == "batchtopk": m.threshold = torch.tensor(p.theta)
        if name == "gated": m.gate_bias.data.fill_(-p.theta)
        out[f"dl_{name}"] = Fn(m, lambda x, m=m: nonzero(m.encode(x)))
    return out


def sparsify(p:Problem) -> dict[str, Contestant]:
    import io
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder
    s = p.shape
    c = SparseCoder(s.d_in, SparseCoderConfig(num_latents=s.d_sae, k=s.l0))
    c.encoder.weight.data, c.W_dec.data = p.W, p.W
    l0 = lambda x: (c.encode(x).top_acts > 0).sum(1).float().mean().item()
    return {"sp_topk": Fn(lambda x: c.decode(*c.encode(x)[:2]), l0), "sp_topk_encode": Fn(c.encode, l0)}


def differences(cs:dict[str, Contestant], p:Problem, x) -> dict[str, float]:
    "Largest deviation of the reconstructions from the dense one."
    z = x @ p.W_T
    want, clear = (z * (z > p.theta)) @ p.W, ~((z - p.theta).abs() < 1e-4).any(1)
    if not clear.any(): return {}
    return {n: float((c.f(x) - want)[clear].abs().max()) for n, c in cs.items() if n in ("ours", "ours_list", "ours_screened", "ref_list", "ref_screened", "sl_jumprelu", "dl_jumprelu")}


@torch.no_grad()
def measure(shape:Shape, args) -> dict:
    torch.set_num_threads(args.threads[0])
    p, names, made, broken = Problem(shape), chosen(args.only, list(NAMES), list(NAMES)), {}, {}
    for head, make in dict(ours=ours, ref=reference, sl=saelens, dl=dictionary_learning, sp=sparsify).items():
        wanted = [n for n in names if n.split("_")[0] == head]
        if not wanted: continue
        try: cs = make(p)
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as e: broken |= {n: {"error": f"{type(e).__name__}: {e}"} for n in wanted}; continue
        made |= {n: cs[n] for n in wanted}
    made = {"floor": Floor(p), **made}
    times, errors = race(made, p.x, args.rounds, args.warm)
    rows = rows_of(made, times, errors, shape, p.x[0]) | broken
    for n, v in differences({n: c for n, c in made.items() if n not in errors}, p, p.x[0]).items(): rows[n]["difference"] = float(f"{v:.2g}")
    TITLES.update(NAMES)
    show(shape, rows, f"; threads {args.threads[0]}, allocator setting {'on' if allocator_set() else 'off'}")
    return {"shape": shape.word, "threads": args.threads[0], "allocator_setting": allocator_set(), "rounds": args.rounds, "screening_in_library": screens(), "rows": rows, "times_as_long_cpu": speedups(times, errors), "times_as_long_wall": speedups(times, errors, "wall")}


def parser():
    p = argument_parser((__doc__ or "") + listed(list(NAMES)))
    p.add_argument("--shape", type=Shape.read, nargs="+", default=[Shape(512, 8192, 1024)], help="d_in,d_sae,batch[,l0] (default: 512,8192,1024)")
    p.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of threads, each in a process of its own (default: 1)")
    p.add_argument("--malloc", nargs="?", const="on", default="off", choices=["off", "on", "both"], help=f"run with glibc told to keep large blocks: {', '.join(ALLOCATOR)} (default: off)")
    p.add_argument("--only", help="names, separated by commas; the floor always runs")
    p.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    p.add_argument("--warm", type=int, default=3, help="rounds before them (default: 3)")
    p.add_argument("--json-to", type=Path, help=argparse.SUPPRESS)
    return p


def main(words:list[str]|None=None) -> dict|None:
    "Measure and report."
    args = parser().parse_args(words)
    tables = tables_of(__file__, measure, args, args.shape, list(NAMES), list(NAMES))
    return None if tables is None else reported("inference", {"tables": tables}, args, args.shape)


if __name__ == "__main__": main()
