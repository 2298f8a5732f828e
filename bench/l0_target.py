"""Does a training end at the L0 that was asked for, without any search? Synthetic data, three sites of the embedded language model, scikit-learn's digits.

    python bench/l0_target.py --out bench/results/l0_target.jsonl          # about half an hour on one thread; goes on after an interruption with the same line

Three numbers: the mean over the last tenth of the training, before the last calibration; the trained SAE on fresh data; and both divided by what was asked for. Digits are 1,797 images of 64 pixels: 1,400 to train
on, many times over in batches of 256, the rest held out."""
from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from _common import argument_parser, commit
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.data.synthetic import preset
from jumprelu_nb.evaluate.metrics import reconstruction
from jumprelu_nb.evaluate.sweep import lm_splits
from jumprelu_nb.train.trainer import train

SITES = ("resid_post.2", "mlp_out.2", "attn_out.2")
DATA, L0S = ("synth_sae_bench_cpu", *SITES, "digits"), (8., 16., 32., 64.)
RECIPES = ("practical", "l0_target", "gated", "relu_l1")


def load(name:str, tokens:int, cache:Path|None):
    "Training data, held-out rows, and a width."
    if name == "digits":
        from sklearn.datasets import load_digits
        x = torch.tensor(load_digits().data, dtype=torch.float32)[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
        return x[:1400], x[1400:], 512
    if name in SITES:
        s = lm_splits(LanguageModel.load("embedded"), name, tokens=tokens, cache=cache)
        return s.train, s.validation, 1024
    truth = preset(name, seed=5)
    return truth.activations(0), truth.sample(50_000, seed=99).x, 1024


def main() -> None:
    "Run what is missing."
    p = argument_parser(__doc__)
    p.add_argument("--data", nargs="*", default=DATA); p.add_argument("--recipes", nargs="*", default=RECIPES); p.add_argument("--l0", type=float, nargs="*", default=L0S); p.add_argument("--seeds", type=int, nargs="*", default=[0])
    p.add_argument("--tokens", type=int, default=500_000); p.add_argument("--cache", type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    keys = ("data", "recipe", "asked", "seed")
    have = {tuple(json.loads(line)[k] for k in keys) for line in a.out.read_text().splitlines()} if a.out and a.out.exists() else set()
    for name in a.data:
        todo = [(name, r, l0, s) for r in a.recipes for l0 in a.l0 for s in a.seeds if (name, r, l0, s) not in have]
        if not todo: continue
        x, held, d_sae = load(name, a.tokens, a.cache)
        for cell in todo:
            _, r, l0, seed = cell
            began = time.process_time()
            try: run = train(x, recipe=r, l0=l0, d_sae=d_sae, tokens=a.tokens, seed=seed, progress=False, **(dict(batch_size=256) if name == "digits" else {}))
            except (ValueError, FloatingPointError) as e: row = dict(failed=str(e))
            else:
                m, last = reconstruction(run.sae, held).result(), [line["l0"] for line in run.log if line["tokens"] > .9*a.tokens]
                row = dict(training_l0=round(sum(last)/len(last), 3), l0=round(m["l0"], 3), ratio=round(m["l0"]/l0, 4), training_ratio=round(sum(last)/len(last)/l0, 4), fvu=round(m["fvu"], 5), dead=round(m["dead_fraction"], 4))
            row = dict(zip(keys, cell)) | row | dict(cpu_seconds=round(time.process_time() - began, 1), commit=commit())
            print(json.dumps(row), flush=True)
            if a.out:
                a.out.parent.mkdir(parents=True, exist_ok=True)
                with open(a.out, "a", encoding="utf-8") as f: f.write(json.dumps(row) + "\n")


if __name__ == "__main__": main()
