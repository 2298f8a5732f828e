"""The sparsity–fidelity frontier of the embedded language model: recipes × L0s × seeds at several sites, learning rates tuned for all alike.

    python bench/frontier.py --processes 2 --out bench/results/frontier.json --picture nbs/images/frontier.svg

Four stages, each of which can be run alone (`--stage`) and continued after an interruption; nothing that is done is done again:

harvest  activations of every site to .npy files: training (contexts drawn from all of the training text), and two halves of the validation text, one to choose by and one to report
tune     every recipe with the same learning-rate multipliers, at a few L0s, with a seed that the sweep does not use; scored on the tuning half only
sweep    every recipe with its best multiplier at every L0 and seed; measured on the validation half, and spliced into the model
report   matched-L0 tables, ratios seed by seed, the random control, and what the claims about frontiers come to; all cells as one JSONL file beside the JSON

With `--processes N` the middle two run in N processes of `--threads` threads each, which share the memory-mapped activations and write files of their own."""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from _common import argument_parser, report, root
from jumprelu_nb.data.activations import harvest, keep_mask
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.data.text import pack, texts
from jumprelu_nb.evaluate.frontier import Frontier
from jumprelu_nb.evaluate.sweep import sweep

metrics = ("fvu", "delta_ce", "kl", "loss_recovered_mean", "loss_recovered_zero", "shrinkage", "dead_fraction", "dense_fraction")


def arguments() -> argparse.Namespace:
    "The command line."
    p = argument_parser(__doc__)
    p.add_argument("--model", default="embedded")
    p.add_argument("--text", default="stdlib")
    p.add_argument("--sites", nargs="+", default=["resid_post.2", "mlp_out.2", "attn_out.2"])
    p.add_argument("--recipes", nargs="+", default=["practical", "batch_topk", "topk", "gated", "relu_l1"])
    p.add_argument("--l0", nargs="+", type=float, default=[8, 16, 32, 64])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--tokens", type=int, default=1_000_000, help="length of every training")
    p.add_argument("--d-sae", type=int, default=1024)
    p.add_argument("--batch-size", type=int, help="default: the recipes'")
    p.add_argument("--lrs", nargs="+", type=float, default=[.5, 1, 2], help="multipliers to tune over; one alone is taken without tuning")
    p.add_argument("--tune-l0", nargs="+", type=float, default=[16, 32], help="L0s to tune at")
    p.add_argument("--tune-seed", type=int, default=100)
    p.add_argument("--held-out", type=int, default=50_000, help="positions of the tuning data, and of the validation data")
    p.add_argument("--fidelity-tokens", type=int, default=16_384)
    p.add_argument("--folder", type=Path, default=root/"runs"/"frontier", help="activations and cells")
    p.add_argument("--group", type=int, default=8, help="SAEs per pass over the data")
    p.add_argument("--threads", type=int, default=1, help="per process")
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--stage", choices=["all", "harvest", "tune", "sweep", "report"], default="all")
    p.add_argument("--part", default="0/1", help="i/n: the i-th of n processes; set by --processes")
    p.add_argument("--picture", type=Path, help="an SVG file")
    return p.parse_args()


def write(path:Path, rows:int, d:int, blocks) -> None:
    "Write rows to an .npy file, under a temporary name until it is whole."
    path.parent.mkdir(parents=True, exist_ok=True)
    part, at = path.with_name(f".{path.name}.{os.getpid()}"), 0
    out = np.lib.format.open_memmap(part, "w+", np.float32, (rows, d))
    for b in blocks: out[at:at + len(b)] = b; at += len(b)
    assert at == rows
    out.flush(); del out
    os.replace(part, path)


def harvested(a:argparse.Namespace, lm:LanguageModel) -> None:
    "Make what is missing of the activations."
    missing = [s for s in a.sites if not all((a.folder/"activations"/s/f"{k}.npy").exists() for k in ("train", "tuning", "validation"))]
    if not missing: return
    ids = pack(lm, texts(a.text, "train"))
    some = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    ids = ids[some[:-(-a.tokens*103//100//(ids.shape[1] - 1))]]                    # 3 % of the positions may be special tokens
    tuning, validation = pack(lm, texts(a.text, "validation"), max_tokens=2*a.held_out).chunk(2)
    a.folder.mkdir(parents=True, exist_ok=True)
    np.save(a.folder/"contexts.npy", validation.numpy())
    for site in missing:
        for name, tokens in (("train", ids), ("tuning", tuning), ("validation", validation)):
            rows = int(keep_mask(lm, tokens).sum())
            write(a.folder/"activations"/site/f"{name}.npy", rows, lm.site(site).d_in, (harvest(lm, site, part).float().cpu().numpy() for part in tokens.split(64)))
            print(f"{site} {name}: {rows:,} rows", file=sys.stderr)


def cells(a:argparse.Namespace, lm:LanguageModel, site:str, stage:str, lrs) -> Frontier:
    "One stage of one site."
    data = {k: np.load(a.folder/"activations"/site/f"{k}.npy", mmap_mode="r") for k in ("train", "tuning", "validation")}
    i, n = map(int, a.part.split("/"))
    common = dict(d_sae=a.d_sae, tokens=a.tokens, validation=data["validation"], tuning=data["tuning"], name=site, out=a.folder/stage/site, group=a.group, part=(i, n), **({} if a.batch_size is None else dict(batch_size=a.batch_size)))
    if stage == "tune": return sweep(data["train"], a.recipes, a.tune_l0, [a.tune_seed], lrs=lrs, control=False, **common)
    return sweep(data["train"], a.recipes, a.l0, a.seeds, lrs=lrs, lm=lm, site=site, text=torch.from_numpy(np.load(a.folder/"contexts.npy")), fidelity_tokens=a.fidelity_tokens, **common)


def chosen(a:argparse.Namespace, site:str) -> dict[str, float]:
    "Recipe → multiplier, by the tuning data."
    if len(a.lrs) == 1: return {r: a.lrs[0] for r in a.recipes}
    f = Frontier.load(a.folder/"tune"/site).only(recipe=a.recipes, lr=a.lrs, l0=a.tune_l0, seed=a.tune_seed)
    if len(f) < (n := len(a.recipes)*len(a.lrs)*len(a.tune_l0)): raise SystemExit(f"The tuning of {site} has {len(f)} of {n} cells: run --stage tune to its end first.")
    return f.best_lr()


def stage(a:argparse.Namespace, which:str) -> None:
    "Run tuning or sweep of all sites, in several processes if asked to."
    if which == "tune" and len(a.lrs) == 1: return
    if a.processes > 1:
        given, skip = [], False
        for x in sys.argv[1:]:                                                         # the same arguments, but for these
            if skip: skip = False
            elif x in ("--processes", "--stage", "--part"): skip = True
            else: given.append(x)
        running = [subprocess.Popen([sys.executable, __file__, *given, "--stage", which, "--part", f"{i}/{a.processes}"]) for i in range(a.processes)]
        if any([p.wait() for p in running]): raise SystemExit(f"A process of the stage {which} failed: see above, and run the same command again to continue.")
        return
    lm = LanguageModel.load(a.model)
    for site in a.sites: cells(a, lm, site, which, a.lrs if which == "tune" else chosen(a, site))


def short(v): # numbers to five digits, all the way down
    return {str(k): short(x) for k, x in v.items()} if isinstance(v, dict) else [short(x) for x in v] if isinstance(v, list) else float(f"{v:.5g}") if isinstance(v, float) else v


def ratios(f:Frontier, a:str, b:str, l0s, metric:str) -> dict:
    "Ratio a/b at matched L0."
    return {f"{l0:g}": dict(mean=r.mean, min=r.min, max=r.max, wins=r.wins, seeds=len(r.values)) for l0, r in f.compare(a, b, l0s, metric).items() if r.values}


def results(a:argparse.Namespace) -> tuple[dict, Frontier]:
    "Everything that is said about the cells."
    sites, whole = {}, Frontier([])
    for site in a.sites:
        f = Frontier.load(a.folder/"sweep"/site).only(recipe=[*a.recipes, "random"], l0=a.l0, seed=a.seeds)
        best = chosen(a, site)
        f = Frontier([r for r in f.rows if r["lr"] == best.get(r["recipe"], 1.)])
        whole += f
        table = {m: {f"{l0:g}": {n: dict(mean=p.mean, min=p.min, max=p.max, seeds=len(p.values), **({"missing": sorted(set(p.missing.values()))} if p.missing else {})) for n, p in f.at(l0, m).items()} for l0 in a.l0} for m in metrics}
        first = a.recipes[0]
        sites[site] = dict(cells=len(f), best_lr=best, failed=sum("failed" in r for r in f.rows), at=table, against_first={m: {n: ratios(f, n, first, a.l0, m) for n in [*a.recipes[1:], "random"]} for m in ("fvu", "delta_ce")},
                           seconds={n: sum(r["seconds"] for r in f.rows if r["recipe"] == n)/max(1, sum(r["recipe"] == n for r in f.rows)) for n in a.recipes})
        for m in ("fvu", "delta_ce"): print(f"\n{site}\n{f.table(a.l0, m, against=first)}", file=sys.stderr)
        edge = [n for n, lr in best.items() if len(a.lrs) > 1 and lr in (min(a.lrs), max(a.lrs))]
        if edge: sites[site]["at_the_edge_of_the_grid"] = edge
    return dict(sites=sites, claims=claims(a, whole)), whole


def claims(a:argparse.Namespace, f:Frontier) -> dict:
    "What is claimed about frontiers, as numbers; whether they hold is for the reader."
    out = {}
    for site in a.sites:
        g = f.only(name=site)
        def ordered(x, y, metric="delta_ce"): return {l: [r["wins"], r["seeds"]] for l, r in ratios(g, x, y, a.l0, metric).items()} if {x, y} <= {*a.recipes, "random"} else None
        out[site] = {f"{x} below {y} in {m}: [wins, seeds] by L0": w for m in ("delta_ce", "fvu") for x, y in (("practical", "gated"), ("gated", "relu_l1"), ("practical", "topk"), ("practical", "batch_topk"), ("practical", "random")) if (w := ordered(x, y, m))}
    if len(a.sites) > 1:                                                               # the residual stream costs more than the parts that are added to it
        at = {s: f.only(name=s).at(a.l0[len(a.l0)//2], "delta_ce").get(a.recipes[0]) for s in a.sites}
        out["delta_ce, ratio of the first site to the others"] = {s: at[a.sites[0]].mean/p.mean for s, p in at.items() if p and p.values and s != a.sites[0]}
    return out


def main() -> None:
    "Run the stages."
    a = arguments()
    torch.set_num_threads(a.threads)
    if a.stage in ("all", "harvest", "tune", "sweep"): harvested(a, LanguageModel.load(a.model))
    for which in ("tune", "sweep"):
        if a.stage in ("all", which): stage(a, which)
    if a.stage in ("all", "report"):
        found, whole = results(a)
        report("frontier", short(found), a)
        if a.out: whole.save(a.out.with_suffix(".jsonl"), digits=5)
        if a.picture: whole.picture(a.picture, "delta_ce", "loss added to the model, nats per token")


if __name__ == "__main__": main()
