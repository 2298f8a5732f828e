"""Put the claims of the literature on JumpReLU SAEs to the test: one small experiment per claim, on fresh seeds, plain numbers out, no verdicts.

    python bench/claims.py --out bench/results/claims.json                                   everything that is not there yet
    python bench/claims.py --rows 4 6 9 --seeds 101 102 103 --out bench/results/claims.json  some of it
    python bench/claims.py --rows 25 26 27 28 29 --out bench/results/claims.json             the language model's part

Rows are those of the page nbs/tutorials/01_claims.ipynb, which holds the criteria and computes the verdicts. Every seed gives a dictionary, a data stream, initial
weights and an evaluation sample of its own. A row and seed that the file holds already is not run again (--again runs it); trained SAEs are noted one by one in
`<out>_cells.jsonl`, so that rows share them and an interruption costs one training at most."""
from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from _common import argument_parser, commit, machine, root, versions

from jumprelu_nb.data.activations import Activations, keep_mask
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.data.synthetic import Synthetic, preset
from jumprelu_nb.data.text import pack, texts
from jumprelu_nb.evaluate.fidelity import fidelity
from jumprelu_nb.evaluate.metrics import reconstruction
from jumprelu_nb.evaluate.recovery import recovery
from jumprelu_nb.sae.gated import GatedGate
from jumprelu_nb.sae.gates import JumpReLUGate
from jumprelu_nb.sae.model import SAE, write_atomically
from jumprelu_nb.sae.ste import KERNELS, gaussian_grad, gaussian_ste_grad, heaviside, jumprelu
from jumprelu_nb.train.recipes import get_recipe
from jumprelu_nb.train.trainer import Trainer, train

# ---------------------------------------------------------------------------------------------------------- the toy setting
# Its learning rate, schedule, batch and initialisation are those in which the thresholds of the criteria were found, on other dictionaries
SETTING = dict(batch_size=256, lr=1e-3, lr_threshold=1e-3, warmup=25_600, decay=.2, enc_scale=1., b_dec="zero", calibrate=False, penalty_warmup=.2, l0_start=1., l0_ramp=0., steer=False)
JUMP = dict(recipe="l0_target", betas=(0., .999), threshold=.05, bandwidth=.05, relative_bandwidth=None, parametrisation="raw")     # the notebook recipe of 2025
JUMPRELU = dict(JUMP, objective="l0_target", coefficient=.3, l0=3.)                  # λ'(L0/L0* − 1)², of the batch mean
L0LOSS = dict(JUMP, objective="l0", coefficient=.01, l0=None)                        # λ·L0
GATED = dict(recipe="gated", betas=(0., .999), coefficient=.5, l0=None)
RELU = dict(recipe="relu_l1", betas=(.9, .999), coefficient=.5, l0=None)
TOPK = dict(recipe="topk", betas=(.9, .999), l0=3.)
BATCH_TOPK = dict(recipe="batch_topk", betas=(.9, .999), l0=3.)
STEPS = 3000                                                                         # of 256 tokens each

_file: Path|None = None                                                              # where cells are noted
_cells: dict[str, dict] = {}                                                         # key → numbers


def truth_of(data:str, seed:int) -> Synthetic:
    "The data set of that name with a dictionary of its own per seed. `toy+5` has a mean of 5 standard deviations, `toy+0` none."
    name, _, gamma = data.partition("+")
    truth = preset(name, seed=seed)
    if gamma:
        x = truth.sample(100_000, seed=10_000 + seed).x.double()
        direction = F.normalize(torch.randn(truth.d_in, generator=torch.Generator().manual_seed(seed)), dim=0)
        truth.bias = (-x.mean(0) + float(gamma)*(x - x.mean(0)).square().sum(-1).mean().sqrt()*direction).float()
        truth.mark += f" mean {gamma}"
    return truth


def note(key:dict, make:Callable[[], dict]) -> dict:
    "Numbers of one trained SAE: remembered, or made and written down."
    name = json.dumps(key, sort_keys=True)
    if name not in _cells:
        began, cpu = time.perf_counter(), time.process_time()
        found = {k: None if isinstance(v, float) and not math.isfinite(v) else float(f"{v:.6g}") if isinstance(v, float) else v for k, v in make().items()}
        _cells[name] = found | dict(seconds=round(time.perf_counter() - began, 1), cpu_seconds=round(time.process_time() - cpu, 1))
        if _file is not None:
            with open(_file, "a", encoding="utf-8") as f: f.write(json.dumps({"key": key} | _cells[name]) + "\n")
    return _cells[name]


def cell(seed:int, base:dict, data:str="toy", d_sae:int=60, steps:int=STEPS, **changes) -> dict:
    "Train one SAE in the toy setting and measure it on 20,000 fresh samples."
    fields = SETTING | base | changes
    return note(dict(data=data, seed=seed, d_sae=d_sae, steps=steps, **{k: v for k, v in fields.items() if SETTING.get(k) != v}), lambda: measure(seed, fields, data, d_sae, steps))


def measure(seed:int, fields:dict, data:str, d_sae:int, steps:int) -> dict:
    "One training and its evaluation."
    truth, fields = truth_of(data, seed), dict(fields)
    acts, recipe = truth.activations(seed), get_recipe(fields.pop("recipe"), **fields)
    run = train(acts, recipe=recipe, d_sae=d_sae, tokens=steps*recipe.batch_size, seed=seed, progress=False)
    r = recovery(run.sae, truth, seed=20_000 + seed)
    f, C = r.per_latent["frequency"], acts.sample(8192).square().sum(-1).mean().sqrt().item()
    out = {k: r.metrics[k] for k in ("l0", "fvu", "shrinkage", "recovered", "mmcs_features", "mcc", "f1", "f1_features", "control_fvu", "control_recovered")}
    out |= dict(dead=(f < 1e-4).double().mean().item(), dense=int((f > .1).sum()), fmax=f.max().item())
    if run.sae.threshold is not None: out |= dict(theta=(run.sae.threshold.median() / C).item())          # at E‖u‖² = 1
    return out | {k: v for k, v in r.metrics.items() if k.startswith(("parent", "absorption"))}


def at(l0:float, cells:list[dict], key:str="fvu", margin:float=1.05) -> float|None:
    "Read a curve at one L0: ln of the metric is linear in ln L0 between the nearest two cells, and up to 5 % beyond the last; None further out."
    points = sorted((math.log(c["l0"]), math.log(c[key])) for c in cells)
    t = math.log(l0)
    if not points[0][0] - math.log(margin) <= t <= points[-1][0] + math.log(margin): return None
    i = min(max(sum(x < t for x, _ in points), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return math.exp(y0 + (y1 - y0)*(t - x0)/(x1 - x0))


def over(a:float, b:float|None) -> float|None: return None if b is None else a/b


# ---------------------------------------------------------------------------------------------------------- rows
def row_6(seed):
    "JumpReLU against Gated and ReLU-L1 at equal L0, and once more at the true L0 with four times the steps."
    j = cell(seed, JUMPRELU)
    gated, relu = [cell(seed, GATED, coefficient=c) for c in (.5, .6, .7)], [cell(seed, RELU, coefficient=c) for c in (.5, .65)]
    long, long_gated = cell(seed, JUMPRELU, l0=2., steps=4*STEPS), [cell(seed, GATED, coefficient=c, steps=4*STEPS) for c in (.6, .7)]
    g, r, lg = at(j["l0"], gated), at(j["l0"], relu), at(long["l0"], long_gated)
    return dict(l0=j["l0"], fvu=j["fvu"], fvu_gated=g, fvu_relu=r, ratio_gated=over(j["fvu"], g), ratio_relu=over(j["fvu"], r), ratio_gated_uncorrected=j["fvu"]/gated[0]["fvu"], l0_gated=gated[0]["l0"],
                ratio_relu_uncorrected=j["fvu"]/relu[0]["fvu"], l0_relu=relu[0]["l0"], control_fvu=j["control_fvu"], recovered=j["recovered"], recovered_gated=gated[0]["recovered"], recovered_relu=relu[0]["recovered"],
                long_l0=long["l0"], long_fvu=long["fvu"], long_fvu_gated=lg, long_ratio=over(long["fvu"], lg), long_recovered=long["recovered"], long_recovered_gated=long_gated[0]["recovered"])


def row_7(seed):
    "JumpReLU against TopK, on data with a varying and with a constant number of features."
    j, top = cell(seed, JUMPRELU), [cell(seed, TOPK, l0=k) for k in (3., 4.)]
    same = "toy_constant_l0"
    jc, jt, tc = cell(seed, JUMPRELU, same), cell(seed, JUMPRELU, same, l0=2.), [cell(seed, TOPK, same, l0=k) for k in (2., 3., 4.)]
    t, c, at_truth = at(j["l0"], top), at(jc["l0"], tc), at(jt["l0"], tc)
    return dict(l0=j["l0"], fvu=j["fvu"], fvu_topk=t, ratio_topk=over(j["fvu"], t), ratio_uncorrected=j["fvu"]/top[0]["fvu"], l0_topk=top[0]["l0"], recovered=j["recovered"], recovered_topk=top[0]["recovered"],
                constant_l0=jc["l0"], constant_ratio=over(jc["fvu"], c), constant_gap=None if c is None else 1 - jc["fvu"]/c, truth_l0=jt["l0"], truth_ratio=over(jt["fvu"], at_truth))


def row_8(seed):
    "JumpReLU against BatchTopK."
    j, b = cell(seed, JUMPRELU), [cell(seed, BATCH_TOPK, l0=k) for k in (3., 3.5)]
    m = at(j["l0"], b)
    return dict(l0=j["l0"], fvu=j["fvu"], l0_batch_topk=b[0]["l0"], fvu_batch_topk=b[0]["fvu"], ratio_uncorrected=j["fvu"]/b[0]["fvu"], fvu_matched=m, ratio=over(j["fvu"], m))


def row_9(seed):
    "Shrinkage γ at L0 ≈ 3."
    j, p, r = cell(seed, JUMPRELU), cell(seed, L0LOSS, coefficient=.03), cell(seed, RELU)
    return dict(gamma_target=j["shrinkage"], gamma_l0=p["shrinkage"], gamma_relu=r["shrinkage"], l0_target=j["l0"], l0_l0=p["l0"], l0_relu=r["l0"])


def row_14(seed):
    "Does the L0 target hit? λ' = .3 and 3."
    soft, hard = {k: cell(seed, JUMPRELU, l0=float(k))["l0"]/k - 1 for k in (2, 3, 5)}, cell(seed, JUMPRELU, coefficient=3.)["l0"]/3 - 1
    return {f"over_{k}": v for k, v in soft.items()} | dict(worst=max(map(abs, soft.values())), over_hard=hard, worst_hard=abs(hard))


PER_TOKEN = dict(objective="quadratic_l0", coefficient=.05)                          # (2/L0*)·λ = λ'/L0*², with λ' = .3 and L0* = 3


def row_14b(seed):
    "The same target asked of every token; control: data in which every token has the same number of features."
    out = {}
    for name, data in (("", "toy"), ("constant_", "toy_constant_l0")):
        token, mean = cell(seed, JUMPRELU, data, **PER_TOKEN), cell(seed, JUMPRELU, data, coefficient=3.)
        out |= {name + "ratio": token["fvu"]/mean["fvu"], name + "l0_token": token["l0"], name + "l0_mean": mean["l0"], name + "fvu_token": token["fvu"], name + "fvu_mean": mean["fvu"]}
    return out


SLOW = dict(threshold=.001, bandwidth=.001)


def row_5(seed):
    "The paper's thresholds in a notebook's budget, λ = .01."
    runs = dict(paper=cell(seed, L0LOSS, **SLOW, parametrisation="log", lr=7e-5, lr_threshold=7e-5), log=cell(seed, L0LOSS, **SLOW, parametrisation="log", lr_threshold=1e-2), raw=cell(seed, L0LOSS, **SLOW), notebook=cell(seed, L0LOSS))
    out = {f"l0_{k}": v["l0"] for k, v in runs.items()} | {f"theta_{k}": v["theta"] for k, v in runs.items()} | {f"fvu_{k}": v["fvu"] for k, v in runs.items()}
    return out | dict(moved=abs(runs["paper"]["theta"]/.001 - 1), ratio=runs["notebook"]["l0"]/runs["paper"]["l0"], ratio_raw=runs["raw"]["l0"]/runs["paper"]["l0"])


def stationary(lam:float, eps:float, seed:int, d:int=16, steps:int=2000, batch:int=1024) -> Tensor:
    "Train the thresholds of a frozen orthonormal dictionary on z ~ N(0, 1); (500,) their mean over the latents in the last steps."
    g, theta, trace = torch.Generator().manual_seed(seed), torch.full((d,), .1, requires_grad=True), []
    opt = torch.optim.Adam([theta], lr=3e-3, betas=(0., .999))
    for t in range(steps):
        z = torch.randn(batch, d, generator=g)
        loss = (z - jumprelu(z, theta, eps)).square().sum(-1).mean() + lam*heaviside(z, theta, eps).sum(-1).mean()
        opt.zero_grad(); loss.backward(); opt.step()
        with torch.no_grad(): theta.clamp_(min=0)
        if t >= steps - 500: trace.append(theta.detach().mean())
    return torch.stack(trace)


def root_of_ste(lam:float, eps:float) -> float:
    "Where the expected pseudo-gradient of one Gaussian feature vanishes, by bisection."
    lo, hi = .5*math.sqrt(lam), 2*math.sqrt(lam)
    for _ in range(60):
        mid = (lo + hi)/2
        lo, hi = (mid, hi) if gaussian_ste_grad(mid, lam, eps) < 0 else (lo, mid)
    return lo


def row_4(seed):
    "Where thresholds come to rest: orthonormal dictionary, and in superposition."
    worst, out = 0., {}
    for lam in (.09, .25, .64):
        for eps in (.05, .2):
            theta, want = stationary(lam, eps, seed).mean().item(), root_of_ste(lam, eps)
            out[f"theta_{lam}_{eps}"], out[f"root_{lam}_{eps}"] = theta, want
            worst = max(worst, abs(theta/want - 1))
    toy = {c: cell(seed, L0LOSS, coefficient=c)["theta"]/math.sqrt(c) for c in (.003, .01, .03)}
    return out | dict(worst=worst) | {f"toy_{c}": v for c, v in toy.items()} | dict(toy_min=min(toy.values()), toy_max=max(toy.values()))


STEERED = dict(steer=True, l0_gain=.02)


def row_10(seed):
    "{ReLU, JumpReLU} × {L1, L0}, read at the L0 of JumpReLU with L0. A ReLU under an L0 penalty is a JumpReLU whose thresholds stay at 0 and whose penalty has a pseudo-gradient to z."
    j, relu_l1 = cell(seed, JUMPRELU), [cell(seed, RELU, coefficient=c) for c in (.5, .65)]
    relu_l0 = [cell(seed, L0LOSS, threshold=1e-9, lr_threshold=1e-15, ste_to_input=True, l0=k, **STEERED) for k in (2.9, 3.6)]
    jump_l1 = [cell(seed, JUMP, objective="l1", coefficient=.1, l0=k, **STEERED) for k in (2.9, 3.6)]
    others = dict(relu_l1=at(j["l0"], relu_l1), relu_l0=at(j["l0"], relu_l0), jump_l1=at(j["l0"], jump_l1))
    best = None if None in others.values() else min(others.values())
    return dict(l0=j["l0"], fvu_jump_l0=j["fvu"]) | {f"fvu_{k}": v for k, v in others.items()} | {f"l0_{k}": c["l0"] for k, c in (("relu_l0", relu_l0[0]), ("jump_l1", jump_l1[0]))} | dict(ratio=over(j["fvu"], best))


def row_13(seed):
    "The bandwidth, at λ = .01 and θ₀ = .05."
    runs = {eps: cell(seed, L0LOSS, bandwidth=eps) for eps in (.001, .01, .05, .3, 1.)}
    return {f"l0_{e}": c["l0"] for e, c in runs.items()} | {f"fvu_{e}": c["fvu"] for e, c in runs.items()} | dict(l0_ratio=runs[1.]["l0"]/runs[.05]["l0"], fvu_ratio=runs[1.]["fvu"]/runs[.05]["fvu"])


def row_12(seed):
    "Four kernels of equal variance."
    runs = {name: cell(seed, JUMPRELU, coefficient=3., **({} if name == "rectangle" else dict(kernel=name, bandwidth=k.like_rectangle(.05)))) for name, k in KERNELS.items()}
    fvu, l0 = [c["fvu"] for c in runs.values()], [c["l0"] for c in runs.values()]
    return {f"fvu_{k}": c["fvu"] for k, c in runs.items()} | {f"l0_{k}": c["l0"] for k, c in runs.items()} | dict(spread=max(fvu)/min(fvu) - 1, l0_spread=max(l0)/min(l0) - 1)


def row_15(seed):
    "Two features that fire on 30 % of the tokens: L0 loss against the quadratic frequency loss, λ steered to L0 4."
    base = dict(data="toy_dense", l0=4., **STEERED)
    runs = dict(l0=cell(seed, L0LOSS, **base), qf_1=cell(seed, L0LOSS, objective="quadratic_frequency", omega0=.1, **base), qf_01=cell(seed, L0LOSS, objective="quadratic_frequency", omega0=.01, **base))
    out = {f"{m}_{k}": c[m] for k, c in runs.items() for m in ("dense", "fmax", "l0", "fvu", "recovered")}
    return out | {f"more_{k}": runs[k]["fvu"]/runs["l0"]["fvu"] - 1 for k in ("qf_1", "qf_01")}


def row_20(seed):
    "Parents and children: BatchTopK against Matryoshka, below and at the true L0."
    out = {}
    for k in (2.6, 3.6):
        b, m = cell(seed, BATCH_TOPK, "hierarchy", 64, l0=k), cell(seed, BATCH_TOPK, "hierarchy", 64, l0=k, recipe="matryoshka")
        out |= {f"recall_batch_topk_{k}": b["parent_recall_with_child"], f"recall_matryoshka_{k}": m["parent_recall_with_child"], f"gain_{k}": m["parent_recall_with_child"] - b["parent_recall_with_child"],
                f"fvu_ratio_{k}": m["fvu"]/b["fvu"], f"absorption_batch_topk_{k}": b["absorption_rate"], f"absorption_matryoshka_{k}": m["absorption_rate"], f"l0_batch_topk_{k}": b["l0"], f"l0_matryoshka_{k}": m["l0"],
                f"found_batch_topk_{k}": b["parents_found"], f"found_matryoshka_{k}": m["parents_found"]}
    return out


def row_19(seed):
    "BatchTopK with one constant threshold: is the L0 of fresh data the k of training?"
    out = {f"l0_{k}": cell(seed, BATCH_TOPK, l0=k)["l0"]/k for k in (3., 3.5)}
    return out | dict(worst=max(abs(v - 1) for v in out.values()))


@torch.no_grad()
def row_17(seed):
    "A Gated SAE with random parameters and its fold."
    g = torch.Generator().manual_seed(seed)
    random = lambda *s: torch.randn(*s, generator=g)
    sae = SAE(16, 64, GatedGate(64), pre_encoder_bias=True).init_(seed)
    for p in (sae.gate.r_mag, sae.gate.b_gate, sae.gate.b_mag): p.copy_(random(64))
    sae.b_dec.copy_(random(16)); sae.W_enc.add_(.3*random(16, 64))
    sae.double()
    for p in (sae.gate.r_mag, sae.gate.b_gate, sae.gate.b_mag): p.data = p.data.double()
    x = 2*random(20_000, 16).double()
    z, (gain, shift, theta) = sae.pre_acts(x), sae.gate.inference()
    gated, jump = sae.gate(z), jumprelu(gain*z + shift, theta)
    without = jumprelu(gain*z + shift, shift - gain*sae.gate.b_gate.double())                             # the same without max(·, 0)
    return dict(difference=(gated - jump).abs().max().item(), masks_differ=int(((gated != 0) != (jump != 0)).sum()), active=(gated != 0).double().mean().item(), difference_without_max=(gated - without).abs().max().item())


@torch.no_grad()
def row_18(seed):
    "Fold scale, pre-encoder bias and decoder norms; C from .1 to 37."
    worst, flips = 0., 0
    for C in (.1, 1., 37.):
        g = torch.Generator().manual_seed(seed)
        sae = SAE(16, 64, JumpReLUGate(64, threshold=torch.rand(64, generator=g)), scale=C, pre_encoder_bias=True, decoder_norm="free").init_(seed)
        sae.W_dec.mul_(torch.rand(64, 1, generator=g) + .5); sae.b_dec.copy_(torch.randn(16, generator=g)); sae.b_enc.copy_(.3*torch.randn(64, generator=g))
        x, folded = C*2*torch.randn(20_000, 16, generator=g), sae.fold()
        want, got = sae(x), folded(x)
        near = (sae.pre_acts(x/C) - sae.gate.threshold).abs() < 1e-5                                   # closer to the threshold than float32 can tell
        flips += int((((sae.encode(x) != 0) != (folded.encode(x) != 0)) & ~near).sum())
        clean = ~near.any(-1)
        worst = max(worst, ((want - got)[clean].norm(dim=-1)/want[clean].norm(dim=-1)).max().item())
    return dict(worst=worst, masks_differ=flips)


def row_16(seed):
    "A dictionary 8 times as wide as the truth, without a mean and with one of 5 standard deviations; b_dec starts at 0 or at the mean."
    out = {f"dead_{gamma}_{b}": cell(seed, JUMPRELU, f"toy+{gamma}", 320, b_dec=b)["dead"] for gamma in (0, 5) for b in ("zero", "mean")}
    return out | dict(surplus=1 - 40/320, halved=out["dead_5_mean"]/out["dead_5_zero"] if out["dead_5_zero"] else None)


def row_11(seed):
    "The pseudo-gradient to z, off and on, for two losses."
    target = {k: cell(seed, JUMPRELU, coefficient=3., ste_to_input=on) for k, on in (("off", False), ("on", True))}
    def anthropic(on, l0):
        return cell(seed, dict(JUMP, recipe="anthropic_2025", betas=(.9, .999)), objective="tanh", coefficient=.3, l0=l0, ste_to_input=on, threshold=.1, bandwidth=2., lr_threshold=1e-3/math.sqrt(20), grad_clip=1.,
                    decoder_norm="free", pre_encoder_bias=False, **STEERED)
    on, off = anthropic(True, 3.), [anthropic(False, l0) for l0 in (3., 4.)]              # off, λ is steered to less than what was asked for: read its curve at the L0 of on
    return {f"{m}_target_{k}": c[m] for k, c in target.items() for m in ("fvu", "l0", "dead")} | {f"{m}_tanh_{k}": c[m] for k, c in (("on", on), ("off", off[1])) for m in ("fvu", "l0", "dead")} | dict(
        ratio_target=target["on"]["fvu"]/target["off"]["fvu"], ratio_tanh=over(on["fvu"], at(on["l0"], off)))


def row_21(seed):
    "P-annealing against L1, read at L0 3.3."
    l1, p = [cell(seed, RELU, coefficient=c) for c in (.5, .65)], [cell(seed, dict(RELU, recipe="p_anneal"), coefficient=.1, l0=k, **STEERED) for k in (2.9, 3.6)]
    level = min(max(3.3, min(c["l0"] for c in l1)), max(c["l0"] for c in l1))
    a, b = at(level, p), at(level, l1)
    return dict(l0=level, fvu_p_anneal=a, fvu_l1=b, ratio=None if a is None or b is None else a/b, gamma_p_anneal=p[0]["shrinkage"], gamma_l1=l1[0]["shrinkage"], l0_p_anneal=p[0]["l0"])


def row_22(seed):
    "Silence 30 % of the latents of a BatchTopK SAE by shrinking their encoder columns, and go on for 1,000 steps without and with AuxK."
    # in TopK they would not be silent: a tiny positive pre-activation fires wherever fewer than k others are positive
    def revive(aux:bool) -> dict:
        truth = truth_of("toy", seed)
        recipe = get_recipe("batch_topk", **{k: v for k, v in (SETTING | BATCH_TOPK | dict(decay=0., dead_after=25_600., auxiliary=("auxk",) if aux else ())).items() if k != "recipe"})
        t = Trainer(truth.activations(seed), recipe, 60, STEPS*256, seed)
        batches, x = iter(t.loader), truth.sample(20_000, seed=20_000 + seed).x
        def frequency():
            f = reconstruction(t.sae.eval(), x).frequency                                 # with the gate's running threshold
            t.sae.train()
            return f
        def dead(): return (frequency() < 1e-4).double().mean().item()
        for _ in range(2000): t.step(next(batches))
        before, alive = dead(), frequency().argsort(descending=True)
        chosen = alive[torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:18]]             # among the 40 that fire most
        with torch.no_grad(): t.sae.W_enc[:, chosen] *= .01; t.sae.b_enc[chosen] = 0.; t.silent_for[chosen] = 1e9
        killed, course = dead(), []
        for i in range(1000):
            t.step(next(batches))
            if i % 100 == 99: course.append(dead())
        return dict(before=before, killed=killed, after=course[-1], course=course)
    off, on = (note(dict(row="22", seed=seed, aux=aux), lambda aux=aux: revive(aux)) for aux in (False, True))
    return dict(before=on["before"], killed=on["killed"], after=on["after"], after_without=off["after"], left=on["after"]/on["killed"], left_without=off["after"]/off["killed"], course=on["course"], course_without=off["course"])


PAIRS, WIDTHS = ((1., .25), (1., 1.), (.5, .5), (1.5, 1.), (.5, .25)), (.5, .1, .01, .001)


def pseudo_gradients(theta:float, lam:float, eps:float, z:Tensor) -> Tensor: # (n,) one per sample
    "The θ-gradient of (z − f)² + λH for every sample on its own."
    t = torch.full_like(z, theta, requires_grad=True)
    return torch.autograd.grad(((z - jumprelu(z, t, eps)).square() + lam*heaviside(z, t, eps)).sum(), t)[0]


def row_1(seed):
    "Pseudo-gradients of a million samples against their closed-form expectation, and their spread."
    g = torch.Generator().manual_seed(seed)
    z, worst, slopes, best = torch.randn(1_000_000, generator=g, dtype=torch.float64), 0., [], []
    for theta, lam in PAIRS:
        stds = []
        for eps in WIDTHS:
            each = pseudo_gradients(theta, lam, eps, z)
            worst = max(worst, abs(each.mean() - gaussian_ste_grad(theta, lam, eps)).item()/(each.std().item()/1000))
            stds.append(each.std().log().item())
        x = torch.tensor(WIDTHS).log()
        slopes.append(((x - x.mean())*(torch.tensor(stds) - fmean(stds))).sum().item()/(x - x.mean()).square().sum().item())
        if theta == .5:
            grid = (1., .5, .2, .1, .05, .01, .001)
            mse = [(gaussian_ste_grad(theta, lam, e) - gaussian_grad(theta, lam)).item()**2 + pseudo_gradients(theta, lam, e, z).var().item()/4096 for e in grid]
            best.append(min(mse)/min(mse[0], mse[-1]))
    return dict(worst=worst, slope_min=min(slopes), slope_max=max(slopes), u=max(best))


def row_2(seed):
    "The hand values: θ = .5, ε = .1, z = (.10, .52, .48, 1)."
    z, theta = torch.tensor([.10, .52, .48, 1.], dtype=torch.float64, requires_grad=True), torch.full((4,), .5, dtype=torch.float64, requires_grad=True)
    f, h = jumprelu(z, theta, .1), heaviside(z, theta, .1)
    dz, df = torch.autograd.grad(f.sum(), (z, theta))
    dh, = torch.autograd.grad(h.sum(), theta)
    pairs = ((f, (0, .52, 0, 1)), (h, (0, 1, 0, 1)), (dz, (0, 1, 0, 1)), (df, (0, -5, -5, 0)), (dh, (0, -10, -10, 0)))
    return dict(worst=max((a.detach() - torch.tensor(b, dtype=torch.float64)).abs().max().item() for a, b in pairs))


def row_3(seed):
    "Three bugs of published code that a test would have found: the factor θ of the logarithm, the sum over leading dimensions, the step on z."
    g, eps = torch.Generator().manual_seed(seed), .2
    z, worst = torch.randn(64, 32, 8, generator=g, dtype=torch.float64), 0.
    for theta in (.05, .5, 2.):
        raw, log = torch.full((8,), theta, dtype=torch.float64, requires_grad=True), torch.full((8,), math.log(theta), dtype=torch.float64, requires_grad=True)
        loss = lambda t, z: (jumprelu(z, t, eps)**2).sum() + heaviside(z, t, eps).sum()
        a, b, c = (torch.autograd.grad(loss(t, y), p)[0] for t, y, p in ((raw, z, raw), (log.exp(), z, log), (raw, z.flatten(0, 1), raw)))
        window = -((z - theta).abs() < eps/2).double().sum((0, 1))/eps
        d, = torch.autograd.grad(heaviside(z, raw, eps).sum(), raw)
        worst = max(worst, *(((u - v).abs().max()/v.abs().max().clamp_min(1e-12)).item() for u, v in ((b, theta*a), (c, a), (d, window))))
    return dict(worst=worst)


def row_23(seed):
    "Processor seconds of a step, forward and backward, on one thread: d 128, 1,280 latents, L0 32, 2,048 tokens."
    names, x = ("practical", "l0_target", "topk", "batch_topk", "gated", "relu_l1"), torch.randn(50_000, 128, generator=torch.Generator().manual_seed(seed))
    made = {n: Trainer(Activations.from_tensor(x), get_recipe(n, l0=32.), 1280, 2_000_000, seed) for n in names}
    spent:dict[str, list[float]] = {n: [] for n in names}
    for turn in range(14):                                                            # one after the other, so that a busy machine is busy for all
        for n, t in made.items():
            batch, began = next(t.loader), time.process_time()
            t.step(batch)
            if turn >= 4: spent[n].append(time.process_time() - began)
    return {f"tokens_per_second_{n}": 2048/sorted(v)[len(v)//2] for n, v in spent.items()}


# ---------------------------------------------------------------------------------------------------------- the language model
LM_TOKENS, LM_L0 = 500_000, (8., 16., 32., 64.)


@lru_cache(1)
def language_model() -> tuple[LanguageModel, Tensor, Tensor]:
    "The embedded model, training contexts, validation contexts."
    lm = LanguageModel.load("embedded", device="cpu")
    return lm, pack(lm, texts("stdlib", "train"), max_tokens=LM_TOKENS), pack(lm, texts("stdlib", "validation"), max_tokens=40_000)


@lru_cache(1)
def activations(site:str) -> Tensor:
    "(n, d) activations of the training contexts."
    lm, tokens, _ = language_model()
    return torch.cat([lm.capture(part, site)[site][keep_mask(lm, part)] for part in tokens.split(32)])


def uniformity(lm:LanguageModel, sae:SAE, site:str, tokens:Tensor, at:int=-2) -> tuple[float, int]:
    "r_L0 = e^S/‖y‖₀ of y = f ⊙ W_dec ∇_x L at position `at`, L the mean-centred logit of the token that follows; mean over prompts, and how many."
    kept:list[Tensor] = []
    def leaf(x, _): kept.append(x.detach().requires_grad_()); return kept[-1]
    with torch.enable_grad(), lm.intervene(site, leaf):
        logits = lm.model(input_ids=tokens[:, :tokens.shape[1] + at + 1].long(), use_cache=False).logits[:, -1].float()
        L = logits.gather(1, tokens[:, at + 1, None].long())[:, 0] - logits.mean(-1)
        grad, = torch.autograd.grad(L.sum(), kept[0])
    f = sae.encode(kept[0][:, -1].detach())
    y = (f*(grad[:, -1] @ sae.W_dec.T)).abs()
    p = y/y.sum(-1, keepdim=True).clamp_min(1e-30)
    S, n = -(p*p.clamp_min(1e-30).log()).sum(-1), (y > 0).sum(-1)
    return (S.exp()/n)[n > 1].mean().item(), int((n > 1).sum())


def lm_cell(seed:int, site:str="resid_post.2", l0:float=32.) -> dict:
    "One SAE of the practical recipe on the embedded language model, 1,280 latents, and all that the rows ask of it."
    return note(dict(site=site, l0=l0, seed=seed, tokens=LM_TOKENS), lambda: _lm_measure(seed, site, l0))


@torch.no_grad()
def _lm_measure(seed:int, site:str, l0:float) -> dict:
    lm, _, valid = language_model()
    with torch.enable_grad(): sae = train(activations(site), recipe="practical", l0=l0, d_sae=1280, tokens=LM_TOKENS, seed=seed, progress=False).sae
    x, keep = lm.capture(valid, site)[site], keep_mask(lm, valid)
    stats = reconstruction(sae, x[keep])
    f, m, full = stats.frequency, stats.result(), fidelity(lm, sae, valid, site=site)
    error = torch.stack([(part - sae(part)).square().sum(-1) for part in x])                              # (contexts, positions)
    by_position = (error*keep).sum(0)/keep.sum(0).clamp_min(1)
    out = dict(l0=m["l0"], fvu=m["fvu"], dead=m["dead_fraction"], dense=(f > .1).double().mean().item(), delta_ce=full["delta_ce"], ce_clean=full["ce_clean"], loss_recovered_mean=full["loss_recovered_mean"],
               first=by_position[1:5].mean().item(), rest=by_position[100:].mean().item(), profile=[float(f"{v:.4g}") for v in by_position[1:].tolist()])
    if site.startswith("resid"): out["uniformity"], out["prompts"] = uniformity(lm, sae, site, valid[:: max(1, len(valid)//50)][:50])
    if l0 == 32:
        low = sae.fold().to(torch.bfloat16)
        out["delta_ce_bf16"] = fidelity(lm, low, valid, site=site)["delta_ce"]
    return out


def row_25(seed):
    "Share of latents that fire on more than 10 % of the tokens, at four L0s."
    runs = {k: lm_cell(seed, l0=k) for k in LM_L0}
    share = [c["dense"] for c in runs.values()]
    return {f"dense_{k:g}": c["dense"] for k, c in runs.items()} | {f"fvu_{k:g}": c["fvu"] for k, c in runs.items()} | dict(most=max(share), rises=min(b - a for a, b in zip(share, share[1:])))


def row_26(seed):
    "Uniformity of attribution at four L0s."
    r = {k: lm_cell(seed, l0=k)["uniformity"] for k in LM_L0}
    v = list(r.values())
    return {f"r_{k:g}": x for k, x in r.items()} | dict(rises=max(b - a for a, b in zip(v, v[1:])), prompts=lm_cell(seed, l0=32.)["prompts"])


def row_27(seed):
    "The SAE in bfloat16."
    c = lm_cell(seed)
    return dict(delta_ce=c["delta_ce"], delta_ce_bf16=c["delta_ce_bf16"], change=abs(c["delta_ce_bf16"]/c["delta_ce"] - 1))


def row_28(seed):
    "Squared error by position, BOS left out."
    c = lm_cell(seed)
    return dict(first=c["first"], rest=c["rest"], ratio=c["first"]/c["rest"], profile=c["profile"])


def row_29(seed):
    "What the language model loses at three sites of one layer, at equal L0."
    runs = {s: lm_cell(seed, f"{s}.2") for s in ("resid_post", "mlp_out", "attn_out")}
    return {f"delta_{k}": c["delta_ce"] for k, c in runs.items()} | {f"fvu_{k}": c["fvu"] for k, c in runs.items()} | {f"l0_{k}": c["l0"] for k, c in runs.items()} | {
        f"ratio_{k}": runs["resid_post"]["delta_ce"]/runs[k]["delta_ce"] for k in ("mlp_out", "attn_out")}


ROWS: dict[str, Callable[[int], dict]] = {r: globals()[f"row_{r}"] for r in "6 7 8 9 14 14b 5 4 10 13 12 15 20 19 17 18 16 11 21 22 1 2 3 23 25 26 27 28 29".split()}   # most important first


# ---------------------------------------------------------------------------------------------------------- keeping the results
def load(out:Path|None) -> dict[str, Any]:
    "What was measured before."
    return json.loads(out.read_text(encoding="utf-8")) if out is not None and out.exists() else {"benchmark": "claims", "rows": {}}


def save(out:Path|None, results:dict[str, Any]) -> None:
    "Write everything, atomically, rows in their order."
    results["rows"] = {r: results["rows"][r] for r in sorted(results["rows"], key=lambda r: (int(r.rstrip("b")), r))}
    if out is not None: write_atomically(out, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def rounded(v:Any) -> Any:
    "Five significant digits."
    return float(f"{v:.5g}") if isinstance(v, float) and math.isfinite(v) else None if isinstance(v, float) else [rounded(x) for x in v] if isinstance(v, list) else v


def main() -> None:
    "Run the rows asked for, seed by seed, and save after each."
    global _file
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW", help="which rows (default: all)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[101, 102, 103], help="fresh seeds (default: 101 102 103)")
    parser.add_argument("--again", action="store_true", help="also rows and seeds that the file holds already; the notes on single trainings are used all the same")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if args.out:
        _file = args.out.with_name(args.out.stem + "_cells.jsonl")
        _file.parent.mkdir(parents=True, exist_ok=True)
        for line in _file.read_text(encoding="utf-8").splitlines() if _file.exists() else []:
            c = json.loads(line)
            _cells[json.dumps(c.pop("key"), sort_keys=True)] = c
    results, failed = load(args.out), []
    for row in args.rows:
        for seed in args.seeds:
            if not args.again and str(seed) in results["rows"].get(row, {}).get("seeds", {}): continue
            began = time.perf_counter()
            try: numbers = {k: rounded(v) for k, v in ROWS[row](seed).items()}
            except Exception as e:                                                    # the other rows do not wait for this one
                print(f"row {row}, seed {seed} FAILED: {type(e).__name__}: {e}", flush=True)
                failed.append(f"{row}/{seed}")
                continue
            results = load(args.out) if args.out else results                         # somebody else may have added rows meanwhile
            entry = results["rows"].setdefault(row, {"about": ROWS[row].__doc__, "seeds": {}, "seconds": {}})
            entry["seeds"][str(seed)], entry["seconds"][str(seed)] = numbers, round(time.perf_counter() - began, 1)
            entry |= dict(about=ROWS[row].__doc__, date=time.strftime("%Y-%m-%d", time.gmtime()), commit=commit())
            results |= dict(versions=versions(), machine={k: v for k, v in machine().items() if k != "load_1min"}, command="python bench/claims.py --out bench/results/claims.json")
            save(args.out, results)
            print(f"row {row}, seed {seed}: {entry['seconds'][str(seed)]} s " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if isinstance(v, (int, float))), flush=True)
    if failed: raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    assert root.exists()
    main()
