"""What each choice of the `practical` recipe is worth, to JumpReLU and to BatchTopK: leave one out, on the residual stream of the embedded language model.

    python bench/ingredients.py --out bench/results/ingredients.jsonl          # about twelve minutes on one thread; goes on after an interruption with the same line

A million tokens, 1,024 latents, L0 32; three seeds of the whole recipe, one of each variant; measured on the half of the validation text that no choice was made on."""
from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import torch
from _common import argument_parser, commit
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.evaluate.metrics import reconstruction
from jumprelu_nb.evaluate.sweep import lm_splits
from jumprelu_nb.train.build import learning_rate
from jumprelu_nb.train.recipes import get_recipe
from jumprelu_nb.train.trainer import train

TOKENS, D_SAE, L0 = 1_000_000, 1024, 32.
RATE = learning_rate(get_recipe("practical"), 128, D_SAE, TOKENS)
BOTH = {"whole": {}, "lr 1e-3": dict(lr=1e-3), "lr / 2": dict(lr=RATE/2), "lr × 2": dict(lr=RATE*2), "no momentum": dict(betas=(0., .99)), "β₂ = .999": dict(betas=(.9, .999)), "no ramp": dict(l0_start=1.), "b_dec from 0": dict(b_dec="zero"),
        "no pre-encoder bias": dict(pre_encoder_bias=False), "W_enc = W_decᵀ": dict(enc_scale=1.), "AuxK added": dict(auxiliary=("auxk",))}
OWN = {"start dense (3 × L0)": dict(l0_start=3.), "θ₀ = .001": dict(threshold=.001), "L0-target loss": dict(objective="l0_target", coefficient=3.), "one common θ": dict(lr_threshold=1e-9)}
CELLS = [("practical", "whole", s) for s in (0, 1, 2)] + [("batch_topk", "whole", s) for s in (0, 1, 2)] + [(r, k, 0) for k in BOTH if k != "whole" for r in ("practical", "batch_topk")] + [("practical", k, s) for k in OWN for s in ((0, 1, 2) if k == "one common θ" else (0,))]


def main() -> None:
    "Run what is missing."
    p = argument_parser(__doc__)
    p.add_argument("--cache", type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    keys = ("recipe", "without", "seed")
    have = {tuple(json.loads(line)[k] for k in keys) for line in a.out.read_text().splitlines()} if a.out and a.out.exists() else set()
    s = lm_splits(LanguageModel.load("embedded"), "resid_post.2", cache=a.cache)
    for cell in CELLS:
        if cell in have: continue
        name, without, seed = cell
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                                          # some of these choices are warned of
            sae = train(s.train, recipe=name, l0=L0, d_sae=D_SAE, tokens=TOKENS, seed=seed, progress=False, **(BOTH | OWN)[without]).sae
        m = reconstruction(sae, s.validation).result()
        row = dict(zip(keys, cell)) | dict(l0=round(m["l0"], 2), fvu=round(m["fvu"], 5), dead=round(m["dead_fraction"], 4), cpu_seconds=round(time.process_time() - began, 1), commit=commit())
        print(json.dumps(row, ensure_ascii=False), flush=True)
        if a.out:
            a.out.parent.mkdir(parents=True, exist_ok=True)
            with open(a.out, "a", encoding="utf-8") as f: f.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__": main()
