"""The sparsity–fidelity frontier on the embedded language model: every cell of recipes × L0 × seeds at one site, at learning rates that were tuned with equal effort.

    python bench/claims_frontier.py --site resid_post.2                      # tunes, then trains 60 SAEs: about half an hour on one thread; go on after an interruption with the same line
    python bench/claims_frontier.py --site mlp_out.2 --part 0/2              # half of the groups; another process does --part 1/2

Tuning: one seed that is not reported, L0 32, at the site resid_post.2, four learning rates per recipe (half, once, twice and four times the rule), chosen on one half of the text's validation side.
Reported: the other half. Results: bench/results/frontier/SITE/*.jsonl, one line per SAE."""
import argparse
import json
from pathlib import Path

import torch
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.evaluate.sweep import lm_splits, sweep
from jumprelu_nb.sae.model import write_atomically

results = Path(__file__).resolve().parent/"results"/"frontier"
RECIPES = ("practical", "batch_topk", "topk", "gated", "relu_l1")


def choose(found, target=32.):
    "Per recipe the multiplier with the lowest FVU on tuning data among those that reached the L0 asked for within a tenth, at FVU ∝ L0^-0.6."
    fit = [r for r in found.rows if abs(r["tuning_l0_measured"] / target - 1) < .1]
    scores = {(r["recipe"], r["lr"]): r["tuning_fvu"] * (r["tuning_l0_measured"] / target)**.6 for r in fit}
    return {name: min((lr for n, lr in scores if n == name), key=lambda lr: scores[name, lr]) for name in dict.fromkeys(r["recipe"] for r in fit)}


def tuned(lm, recipes, tokens, d_sae, cache):
    "The learning-rate multiplier of each recipe, chosen on tuning data; a file keeps the choice."
    path = results/"tuning"/f"best-{d_sae}-{tokens}.json"
    best = json.loads(path.read_text()) if path.exists() else {}
    if missing := [r for r in recipes if r not in best]:
        s = lm_splits(lm, "resid_post.2", cache=cache)
        best |= choose(sweep(s.train, missing, [32.], seeds=(1000,), lrs=(.5, 1., 2., 4.), d_sae=d_sae, tokens=tokens, tuning=s.tuning, validation=s.validation, out=results/"tuning",
                             name=f"tuning resid_post.2, {d_sae}, {tokens}", control=False))
        write_atomically(path, json.dumps(best, indent=1))
    return best


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--site", default="resid_post.2"); a.add_argument("--recipes", nargs="*", default=RECIPES); a.add_argument("--l0s", type=float, nargs="*", default=(32., 16., 64., 8.))
    a.add_argument("--seeds", type=int, nargs="*", default=(0, 1, 2)); a.add_argument("--tokens", type=int, default=1_000_000); a.add_argument("--d-sae", type=int, default=1024)
    a.add_argument("--part", default="0/1"); a.add_argument("--cache", type=Path); a.add_argument("--threads", type=int, default=1); a.add_argument("--group", type=int, default=5)
    a.add_argument("--tune-only", action="store_true"); a.add_argument("--out", type=Path)
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    lm = LanguageModel.load("embedded")
    lrs = tuned(lm, a.recipes, a.tokens, a.d_sae, a.cache)
    print("learning rates, relative to the rule:", lrs, flush=True)
    if not a.tune_only:
        i, n = map(int, a.part.split("/"))
        s = lm_splits(lm, a.site, cache=a.cache)
        done = sweep(s.train, a.recipes, a.l0s, a.seeds, d_sae=a.d_sae, tokens=a.tokens, tuning=s.tuning, validation=s.validation, lrs=lrs, lm=lm, site=a.site, text=s.contexts, fidelity_tokens=8192,
                     out=a.out or results/a.site, name=a.site, part=(i, n), group=a.group)
        print(done)
