"""Wide dictionaries and long runs: does the learning-rate rule hold there, do latents die, and does AuxK help? On the embedded language model's residual stream.

    python bench/long_runs.py --out bench/results/long_runs.jsonl          # about an hour on one thread; goes on after an interruption with the same line

The text gives 3.1 million positions of training data, so ten million tokens read each of them three times, in another order each time. Measured on the half of the validation text that no choice was made on."""
from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from _common import argument_parser, commit
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.evaluate.metrics import random_control, reconstruction
from jumprelu_nb.evaluate.sweep import lm_splits
from jumprelu_nb.train.build import learning_rate
from jumprelu_nb.train.recipes import get_recipe
from jumprelu_nb.train.trainer import train

# width, tokens, recipe, AuxK added, multiplier of the rule's learning rate, seed: most important first
GRID = [(4096, 10_000_000, "practical", False, 1., 0), (4096, 10_000_000, "practical", True, 1., 0), (4096, 10_000_000, "batch_topk", False, 1., 0), (4096, 10_000_000, "practical", False, .5, 0),
        (4096, 10_000_000, "practical", False, 2., 0), (1024, 10_000_000, "practical", False, 1., 0), (1024, 10_000_000, "practical", False, .5, 0), (1024, 10_000_000, "practical", False, 2., 0),
        (4096, 10_000_000, "topk_auxk", False, 1., 0), (4096, 3_000_000, "practical", False, .5, 0), (4096, 3_000_000, "practical", False, 1., 0), (4096, 3_000_000, "practical", False, 2., 0),
        (1024, 10_000_000, "batch_topk", False, 1., 0), (4096, 10_000_000, "practical", False, 1., 1), (4096, 10_000_000, "batch_topk", False, 1., 1)]
KEYS = ("d_sae", "tokens", "recipe", "auxk", "lr", "seed")


def main() -> None:
    "Run what is missing of the grid."
    p = argument_parser(__doc__)
    p.add_argument("--site", default="resid_post.2"); p.add_argument("--l0", type=float, default=32.); p.add_argument("--cache", type=Path); p.add_argument("--part", default="0/1"); p.add_argument("--first", type=int, default=len(GRID))
    a = p.parse_args()
    torch.set_num_threads(1)
    i, n = map(int, a.part.split("/"))
    lm = LanguageModel.load("embedded")
    s = lm_splits(lm, a.site, cache=a.cache)
    have = lambda: {tuple(json.loads(line)[k] for k in KEYS) for line in a.out.read_text().splitlines()} if a.out and a.out.exists() else set()
    for cell in GRID[:a.first][i::n]:
        if cell in have(): continue
        d_sae, tokens, name, auxk, lr, seed = cell
        r = get_recipe(name, l0=a.l0, **(dict(auxiliary=("auxk",)) if auxk else {}))
        if lr != 1: r = r.but(lr=lr*learning_rate(r, lm.d_model, d_sae, tokens))
        began = time.process_time()
        run = train(s.train, recipe=r, d_sae=d_sae, tokens=tokens, seed=seed, progress=False)
        spent = time.process_time() - began
        m, c = reconstruction(run.sae, s.validation).result(), reconstruction(random_control(run.sae, s.train.sample(20_480), seed, a.l0), s.validation).result()
        row = dict(zip(KEYS, cell)) | dict(rate=round((r.lr or learning_rate(r, lm.d_model, d_sae, tokens))*math.sqrt(lm.d_model), 4), l0=round(m["l0"], 2), fvu=round(m["fvu"], 5), dead=round(m["dead_fraction"], 4), dense=round(m["dense_fraction"], 4),
                                           shrinkage=round(m["shrinkage"], 4), control_fvu=round(c["fvu"], 4), last_dead=round(run.log[-1]["dead"], 4), cpu_seconds=round(spent, 1), commit=commit())
        print(json.dumps(row), flush=True)
        if a.out:
            a.out.parent.mkdir(parents=True, exist_ok=True)
            with open(a.out, "a", encoding="utf-8") as f: f.write(json.dumps(row) + "\n")


if __name__ == "__main__": main()
