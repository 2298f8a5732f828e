"""The sparsity–fidelity frontier: every cell of recipes × L0 × seeds on one data set, at learning rates that were tuned with equal effort.

    python bench/frontier.py --data resid_post.2                      # tunes, then trains 60 SAEs: about half an hour on one thread; go on after an interruption with the same line
    python bench/frontier.py --data mlp_out.2 --part 0/2              # half of the groups; another process does --part 1/2
    python bench/frontier.py --data synth_sae_bench_cpu --l0s 4 8 16 32 --lrs .125 .25 .5 1 2 4     # a preset of synthetic data, whose truth is known: 7.3 features per sample
    python bench/frontier.py --picture nbs/images/frontier.svg        # draw what the three sites' files hold

Tuning: one seed that is not reported, the same learning rates for every recipe (for the sites half, once, twice and four times the rule), chosen on data of their own: for the three sites of the embedded model at L0 32 of resid_post.2, on
one half of the text's validation side; for synthetic data at the second L0. Reported: the other half. Results: bench/results/frontier/DATA/*.jsonl, one line per SAE."""
import argparse
import json
from pathlib import Path

import torch
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.data.synthetic import preset
from jumprelu_nb.evaluate.frontier import Frontier
from jumprelu_nb.evaluate.sweep import lm_splits, sweep
from jumprelu_nb.sae.model import write_atomically

results = Path(__file__).resolve().parent/"results"/"frontier"
RECIPES, SITES = ("practical", "batch_topk", "topk", "gated", "relu_l1"), ("resid_post.2", "mlp_out.2", "attn_out.2")


def choose(found, target):
    "Per recipe the multiplier with the lowest FVU on tuning data among those that reached the L0 asked for within a tenth, at FVU ∝ L0^-0.6."
    fit = [r for r in found.rows if abs(r["tuning_l0_measured"] / target - 1) < .1]
    scores = {(r["recipe"], r["lr"]): r["tuning_fvu"] * (r["tuning_l0_measured"] / target)**.6 for r in fit}
    return {name: min((lr for n, lr in scores if n == name), key=lambda lr: scores[name, lr]) for name in dict.fromkeys(r["recipe"] for r in fit)}


def splits(data, lm, cache):
    "Training activations, tuning and validation data, and what else a sweep should measure."
    if data in SITES:
        s = lm_splits(lm, data, cache=cache)
        return s.train, dict(tuning=s.tuning, validation=s.validation), dict(lm=lm, site=data, text=s.contexts, fidelity_tokens=8192)
    truth = preset(data, seed=5)
    return truth.activations(0), dict(tuning=truth.sample(50_000, seed=98).x, validation=truth.sample(50_000, seed=99).x), dict(truth=truth)


def tuned(data, lm, a):
    "The learning-rate multiplier of each recipe, chosen on tuning data; a file keeps the choice."
    where, l0, folder = (SITES[0], 32., results/"tuning") if data in SITES else (data, float(a.l0s[1]), results/f"tuning-{data}")
    path = folder/f"best-{a.d_sae}-{a.tokens}.json"
    best = json.loads(path.read_text()) if path.exists() else {}
    if missing := [r for r in a.recipes if r not in best]:
        acts, held, _ = splits(where, lm, a.cache)
        best |= choose(sweep(acts, missing, [l0], seeds=(1000,), lrs=a.lrs, d_sae=a.d_sae, tokens=a.tokens, **held, out=folder, name=f"tuning {where}, {a.d_sae}, {a.tokens}", control=False), l0)
        write_atomically(path, json.dumps(best, indent=1))
    return best


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--data", default="resid_post.2", help="a site of the embedded model, or a preset of synthetic data"); a.add_argument("--recipes", nargs="*", default=RECIPES); a.add_argument("--l0s", type=float, nargs="*", default=(32., 16., 64., 8.))
    a.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2)); a.add_argument("--tokens", type=int, default=1_000_000); a.add_argument("--d-sae", type=int, default=1024)
    a.add_argument("--part", default="0/1"); a.add_argument("--cache", type=Path); a.add_argument("--threads", type=int, default=1); a.add_argument("--group", type=int, default=5)
    a.add_argument("--lrs", type=float, nargs="*", default=(.5, 1., 2., 4.), help="learning rates to choose from, relative to the rule"); a.add_argument("--tune-only", action="store_true"); a.add_argument("--out", type=Path); a.add_argument("--picture", type=Path)
    a = a.parse_args()
    if a.picture: raise SystemExit(f"Wrote {sum((Frontier.load(results/s) for s in SITES), Frontier([])).picture(a.picture, 'fvu', 'variance unexplained')}.")
    torch.set_num_threads(a.threads)
    lm = LanguageModel.load("embedded") if a.data in SITES else None
    lrs = tuned(a.data, lm, a)
    print("learning rates, relative to the rule:", lrs, flush=True)
    if not a.tune_only:
        i, n = map(int, a.part.split("/"))
        acts, held, more = splits(a.data, lm, a.cache)
        done = sweep(acts, a.recipes, a.l0s, a.seeds, d_sae=a.d_sae, tokens=a.tokens, lrs=lrs, **held, **more, out=a.out or results/a.data, name=a.data, part=(i, n), group=a.group)
        print(done)
