"""Which learning rate is best, for batch size, length and width: FVU at equal L0 on held-out activations of the embedded language model.

    python bench/learning_rate.py --out bench/results/learning_rate.jsonl                 # the whole grid, about an hour on one thread
    python bench/learning_rate.py --width 1024 --batch 2048 --tokens 1000000 --rates .06 .125 .25

A rate is quoted as lr·√d_in. One seed per cell; choices are made on the tail of the training side of the text, which no run has trained on. Finished cells are not repeated."""
import argparse
import json
import math
import time
from pathlib import Path

import torch
from jumprelu_nb.data.activations import Activations
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.sae.gates import JumpReLUGate
from jumprelu_nb.sae.model import SAE, threshold_for_l0
from jumprelu_nb.sae.objectives import Balanced, update_
from jumprelu_nb.sae.sparse import codes_of

GRID = ([(1024, 2048, n, r) for n in (250_000, 500_000, 1_000_000, 2_000_000) for r in (.06, .125, .25, .5)] + [(1024, b, 1_000_000, r) for b in (512, 1024, 4096) for r in (.06, .125, .25)]
        + [(m, 2048, 1_000_000, r) for m in (256, 4096) for r in (.03, .06, .125, .25)] + [(1024, 2048, 10_000_000, r) for r in (.03, .06, .125)]
        + [(4096, 2048, 3_000_000, r) for r in (.03, .06, .125)])


def run(x, held, scale, d_sae, batch, tokens, rate, l0=32., seed=0):
    "Train the practical recipe's SAE on rows in memory, in their order, as often as needed."
    d = x.shape[1]
    u = x[:8192] / scale
    sae = SAE(d, d_sae, JumpReLUGate(d_sae, parametrisation="log", relative_bandwidth=.5), scale=scale, pre_encoder_bias=True).init_(seed, .25, u.mean(0))
    sae.gate.set_threshold_(threshold_for_l0(sae.pre_acts(u).detach(), l0 / 2))
    objective, steps, began = Balanced(l0), math.ceil(tokens / batch), time.process_time()
    opt = torch.optim.Adam([dict(params=[sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec], base=rate / math.sqrt(d)), dict(params=[sae.gate.param], base=.03)], betas=(.9, .99), fused=True)
    for t in range(steps):
        for group in opt.param_groups: group["lr"] = group["base"] * min(1, (t + .5) / (.05 * steps), (1 - (t + .5) / steps) / .3)
        i = (t * batch + seed * 131_071) % (len(x) - batch)
        update_(sae, objective, opt, codes_of(sae, x[i:i + batch] / scale), t / steps)
    sae.gate.set_threshold_(sae.gate.threshold.detach() * threshold_for_l0(sae.pre_acts(x[-20_480:] / scale).detach(), l0, sae.gate.threshold.detach()))
    with torch.no_grad():
        error, fired = 0., torch.zeros(d_sae)
        for b in held.split(4096):
            c = codes_of(sae, b / scale)
            error += (c.u_hat - b / scale).square().sum().double(); fired += c.per_latent((c.f != 0).float())
    frequency = fired / len(held)
    return dict(d_sae=d_sae, batch=batch, tokens=tokens, rate=rate, seed=seed, l0=round(frequency.sum().item(), 2), fvu=round((error / ((held - held.mean(0)) / scale).square().sum().double()).item(), 5),
                dead=round((fired == 0).float().mean().item(), 4), dense=round((frequency > .1).float().mean().item(), 4), cpu_seconds=round(time.process_time() - began, 1))


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--out", type=Path); a.add_argument("--site", default="resid_post.2")
    a.add_argument("--width", type=int, nargs="*"); a.add_argument("--batch", type=int, nargs="*"); a.add_argument("--tokens", type=int, nargs="*"); a.add_argument("--rates", type=float, nargs="*")
    a = a.parse_args()
    torch.set_num_threads(1)
    grid = [c for c in GRID if all(not want or v in want for v, want in zip(c, (a.width, a.batch, a.tokens, a.rates)))]
    done = {tuple(json.loads(line)[k] for k in ("d_sae", "batch", "tokens", "rate")) for line in a.out.read_text().splitlines()} if a.out and a.out.exists() else set()
    x = Activations.from_lm(LanguageModel.load("embedded"), a.site).sample(3_156_184)
    x, held = x[:-100_000], x[-60_000:-10_000]
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    scale = x[:8192].square().sum(-1).mean().sqrt().item()
    for cell in grid:
        if cell in done: continue
        line = json.dumps(run(x, held, scale, *cell))
        print(line, flush=True)
        if a.out:
            with open(a.out, "a") as f: f.write(line + "\n")
