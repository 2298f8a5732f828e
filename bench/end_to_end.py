"""How much sooner the same quality is reached: seconds until the held-out FVU that SAELens's own training loop ends with, at the same L0, on the same activations.

    python bench/end_to_end.py --out bench/results/end_to_end.json      # both data sets, about an hour on one thread
    python bench/end_to_end.py --data synth_sae_bench_cpu --kinds batchtopk --tokens 500000
    python bench/end_to_end.py --data resid_post.2 --cache ~/activations      # keeps what was harvested

Data: a preset of `jumprelu_nb.data.synthetic`, or a site of the embedded language model. The rows are made once, before any clock runs, and both sides
draw their batches from them with the same loader.

Theirs: `SAETrainer.fit` on activations scaled to a mean norm of √d_in beforehand (what its `expected_average_only_in` does, without the 1000 batches
that it reads for that), once as it comes ("default": lr 3e-4, constant, batch 4096) and once per learning rate of a small grid with a warm-up of 5 %
and a decay over the last 20 % ("tuned": the best of them counts, and the time of the others does not). For JumpReLU the coefficient of the L0 penalty
is searched until the held-out L0 is within a tenth of the one wanted; that time does not count either. Where no coefficient leads there, the closest L0
stands for theirs, and ours has the lower of the two. Their clock stands still while we look at their SAE. BatchTopK is measured with the batch's top k,
which holds its L0.

Ours: `train` with the recipe `practical` and nothing tuned, on growing numbers of tokens, each a training of its own, at the L0 that theirs had;
counted is the whole call. The first that reaches the FVU is the answer (`seconds`); beside it stands the time interpolated between this one and the one
before. Seconds of the processor count; wall seconds stand beside them. Peers need the environment that `python bench/peers.py` makes."""
from __future__ import annotations

import math
import os
import sys
import time
import warnings
from pathlib import Path

if __name__ == "__main__": os.environ.setdefault("TQDM_DISABLE", "1")        # their progress bar

import torch
from _common import argument_parser, report
from _peers import PACKAGES, keep_unfinished, missing
from jumprelu_nb.data.activations import Activations
from jumprelu_nb.train.trainer import train

BUDGETS = (.03, .05, .07, .1, .14, .2, .28, .4, .56, .8, 1.1, 1.6)          # of --tokens, for ours


class Clock:
    "Processor and wall seconds, without the pauses."
    def __init__(self): self.cpu = self.wall = 0.; self.go()
    def go(self): self.since = time.process_time(), time.perf_counter()
    def stop(self):
        self.cpu += time.process_time() - self.since[0]; self.wall += time.perf_counter() - self.since[1]
        return {"cpu": round(self.cpu, 3), "wall": round(self.wall, 3)}


def read(data:str, tokens:int, held_out:int, cache:Path|None) -> tuple[torch.Tensor, torch.Tensor]:
    "(n, d_in) rows to train on and rows held out."
    from jumprelu_nb.data.synthetic import PRESETS, preset
    if data in PRESETS:
        truth = preset(data, seed=5)
        return torch.cat([truth.sample(n, seed=i).x for i, n in enumerate(min(50_000, tokens - k) for k in range(0, tokens, 50_000))]), truth.sample(held_out, seed=99_999).x
    from jumprelu_nb.data.lm import LanguageModel
    from jumprelu_nb.evaluate.sweep import lm_splits
    s, rows, n = lm_splits(LanguageModel.load("embedded"), data, cache=cache), [], 0
    for x in s.train.rows("bench end to end"):
        rows.append(x.float().cpu()); n += len(x)
        if n >= min(tokens, s.train.n_rows or tokens): break
    return torch.cat(rows)[:tokens], s.validation[:held_out]


@torch.no_grad()
def quality(encode, decode, x:torch.Tensor, rows:int=4096) -> dict[str, float]:
    "FVU and L0 on held-out rows."
    error = active = 0.
    for part in x.split(rows):
        f = encode(part)
        active += float((f != 0).sum()); error += float((decode(f) - part).double().square().sum())
    return {"fvu": round(error / float((x - x.mean(0)).double().square().sum()), 6), "l0": round(active / len(x), 3)}


def floor_ms(d_in:int, d_sae:int) -> float:
    "How fast the machine is at this moment: one product of 4096 rows, best of five."
    x, W, seconds = torch.randn(4096, d_in), torch.randn(d_in, d_sae), []
    for _ in range(5): t = time.process_time(); x @ W; seconds.append(time.process_time() - t)
    return round(1e3 * min(seconds), 2)


def theirs(kind:str, rows, held, a, lr:float, schedule:bool, coefficient:float|None, seed:int) -> dict:
    "One training by SAELens's loop, with its curve."
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer
    d, B, f = rows.shape[1], a.batch, rows.shape[1]**.5 / rows[:100_000].norm(dim=-1).mean()
    acts, held, steps = Activations.from_tensor(rows * f), held * f, a.tokens // a.batch
    marks = {round(steps * s) for s in (.02, .04, .07, .1, .15, .2, .3, .4, .5, .6, .7, .8, .9)} - {0}
    before, base = floor_ms(d, a.d_sae), dict(d_in=d, d_sae=a.d_sae, dtype="float32", device="cpu")
    torch.manual_seed(seed)
    curve, clock = [], Clock()
    if kind == "jumprelu":
        from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as SAE, JumpReLUTrainingSAEConfig as Config
        sae = SAE(Config(**base, l0_coefficient=coefficient, l0_warm_up_steps=steps // 20 if schedule else 0))
    elif kind == "topk":
        from sae_lens.saes.topk_sae import TopKTrainingSAE as SAE, TopKTrainingSAEConfig as Config
        sae = SAE(Config(**base, k=round(a.l0)))
    else:
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE as SAE, BatchTopKTrainingSAEConfig as Config
        sae = SAE(Config(**base, k=a.l0))
    def look(step):
        clock.stop()
        curve.append({"tokens": step * B, "cpu": round(clock.cpu, 3), "wall": round(clock.wall, 3), **quality(sae.encode, sae.decode, held[:8192])})
        clock.go()
    def batches():
        for i, x in enumerate(acts.loader(B, seed=seed)):
            if i in marks: look(i)
            yield x
    config = SAETrainerConfig(total_training_samples=steps * B, train_batch_size_samples=B, lr=lr, lr_end=lr / 10, **(dict(lr_warm_up_steps=steps // 20, lr_decay_steps=steps // 5) if schedule else {}))
    SAETrainer(config, sae, batches()).fit()
    used = clock.stop()
    return {"kind": kind, "variant": "tuned" if schedule else "default", "lr": lr, "coefficient": coefficient, "tokens": steps * B, "seed": seed, **used, **quality(sae.encode, sae.decode, held), "floor_ms": [before, floor_ms(d, a.d_sae)], "curve": curve}


def searched(kind:str, rows, held, a, lr:float, schedule:bool, seed:int, log) -> dict|None:
    "JumpReLU: search the coefficient that gives the wanted L0; the run closest to it. Other kinds: one run."
    if kind != "jumprelu": return log(theirs(kind, rows, held, a, lr, schedule, None, seed))
    tried: list[dict] = []
    c = a.coefficient
    for _ in range(a.searches):
        r = log(theirs(kind, rows, held, a, lr, schedule, c, seed)); tried.append(r)
        if abs(r["l0"] / a.l0 - 1) <= .1: return r | {"matched": True}
        many, few = [t for t in tried if t["l0"] > a.l0], [t for t in tried if t["l0"] <= a.l0]
        if many and few:                                                    # between the two that embrace the wanted one, on logarithmic scales
            hi, lo = min(many, key=lambda t: t["l0"]), max(few, key=lambda t: t["l0"])
            share = math.log(hi["l0"] / a.l0) / math.log(hi["l0"] / max(lo["l0"], 1e-2))
            c = math.exp(math.log(hi["coefficient"]) + min(.9, max(.1, share)) * math.log(lo["coefficient"] / hi["coefficient"]))
        else: c *= 5. if many else .2
    best = min(tried, key=lambda t: abs(math.log(max(t["l0"], 1e-2) / a.l0)))
    return best | {"matched": abs(best["l0"] / a.l0 - 1) <= .1}


def ours(rows, held, a, l0:float, tokens:int, seed:int) -> dict:
    "One training with `train`."
    before, clock = floor_ms(rows.shape[1], a.d_sae), Clock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                     # a short training is what we want
        sae = train(Activations.from_tensor(rows), recipe=a.recipe, d_sae=a.d_sae, l0=l0, tokens=tokens, seed=seed, progress=False).sae
    used = clock.stop()
    return {"recipe": a.recipe, "tokens": tokens, "seed": seed, "wanted_l0": round(l0, 3), **used, **quality(sae.encode, sae.decode, held), "floor_ms": [before, floor_ms(rows.shape[1], a.d_sae)]}


def answer(goal:dict, rows, held, a, seed:int, log, known:dict) -> dict:
    "The first of our trainings that is as good as theirs."
    l0, runs = goal["l0"] if goal.get("matched", True) else min(goal["l0"], a.l0), []
    for share in BUDGETS:
        tokens = max(1, round(share * a.tokens))
        key = (round(l0, 2), tokens, seed)
        if key not in known: known[key] = log(ours(rows, held, a, l0, tokens, seed))
        runs.append(known[key])
        if runs[-1]["fvu"] <= goal["fvu"]: break
    out = {k: goal[k] for k in ("kind", "variant", "lr", "coefficient", "seed", "fvu", "l0", "cpu", "wall")} | {"matched": goal.get("matched", True), "our_l0": round(l0, 3), "runs": [{k: r[k] for k in ("tokens", "cpu", "wall", "fvu", "l0")} for r in runs]}
    first, last = runs[-1], runs[-2] if len(runs) > 1 else None
    if first["fvu"] > goal["fvu"]: return out | {"reached": False}
    out |= {"reached": True, "seconds": first["cpu"], "seconds_wall": first["wall"], "tokens": first["tokens"], "times_sooner": round(goal["cpu"] / first["cpu"], 2), "times_sooner_wall": round(goal["wall"] / first["wall"], 2)}
    if last and last["fvu"] > first["fvu"]:
        w = math.log(last["fvu"] / goal["fvu"]) / math.log(last["fvu"] / first["fvu"])
        out["seconds_interpolated"] = round(math.exp((1 - w) * math.log(last["cpu"]) + w * math.log(first["cpu"])), 3)
        out["times_sooner_interpolated"] = round(goal["cpu"] / out["seconds_interpolated"], 2)
    return out


def measure(data:str, a, save) -> dict:
    "All trainings on one data set."
    rows, held = read(data, a.tokens, a.held_out, a.cache)
    found = {"data": data, "rows": len(rows), "d_in": rows.shape[1], "d_sae": a.d_sae, "theirs": [], "ours": [], "answers": []}
    def log(kind):
        def keep(r):
            found[kind].append(r); save(found)
            how = f"lr {r['lr']:g}" + (f", λ {r['coefficient']:.3g}" if r["coefficient"] else "") if "lr" in r else ""
            print(f"{data} {kind:6} {r.get('kind') or r['recipe']:10} {r.get('variant', ''):8} {how:22} {r['tokens']:>9,} tokens {r['cpu']:8.2f} s (wall {r['wall']:.2f})  FVU {r['fvu']:.4f}  L0 {r['l0']:.1f}", file=sys.stderr)
            return r
        return keep
    peers = "sae_lens" not in missing()
    for seed in a.seeds:
        known, goals = {}, []
        if peers:
            for kind in a.kinds:
                goals.append(searched(kind, rows, held, a, 3e-4, False, seed, log("theirs")))
                tuned = [searched(kind, rows, held, a, lr, True, seed, log("theirs")) for lr in a.lrs]
                if fit := [t for t in tuned if t.get("matched", True)]: goals.append(min(fit, key=lambda t: t["fvu"]))
                elif tuned: goals.append(min(tuned, key=lambda t: abs(math.log(max(t["l0"], 1e-2) / a.l0))))
        else:
            for share in BUDGETS[::3]: log("ours")(ours(rows, held, a, a.l0, max(1, round(share * a.tokens)), seed))
        for goal in goals:
            r = answer(goal, rows, held, a, seed, log("ours"), known)
            found["answers"].append(r); save(found)
            said = f"{r['times_sooner']} times sooner ({r['seconds']:.2f} s against {r['cpu']:.2f} s)" if r["reached"] else "not reached"
            where = "" if r["matched"] else f", since no coefficient tried led to {a.l0:g}; ours at {r['our_l0']:g}"
            print(f"{data}: FVU {r['fvu']:.4f} of {r['kind']} ({r['variant']}) at L0 {r['l0']:.1f}{where}: {said}", file=sys.stderr)
    return found


def parser():
    p = argument_parser(__doc__)
    p.add_argument("--data", nargs="+", default=["synth_sae_bench_cpu", "resid_post.2"], help="presets of synthetic data, or sites of the embedded language model (default: synth_sae_bench_cpu resid_post.2)")
    p.add_argument("--kinds", nargs="+", default=["jumprelu", "topk", "batchtopk"], choices=["jumprelu", "topk", "batchtopk"], help="SAEs of theirs (default: all three)")
    p.add_argument("--recipe", default="practical", help="recipe of ours (default: practical)")
    p.add_argument("--d-sae", type=int, default=1024, help="number of latents (default: 1024)")
    p.add_argument("--l0", type=float, default=32., help="wanted L0; for topk a whole number (default: 32)")
    p.add_argument("--tokens", type=int, default=1_000_000, help="length of their trainings (default: 1000000)")
    p.add_argument("--batch", type=int, default=4096, help="their batch size (default: 4096, as theirs)")
    p.add_argument("--lrs", type=float, nargs="*", default=[3e-4, 1e-3, 3e-3], help="their tuned learning rates; none: only their default (default: 3e-4 1e-3 3e-3)")
    p.add_argument("--coefficient", type=float, default=1., help="where the search for their JumpReLU's coefficient starts (default: 1, as theirs)")
    p.add_argument("--searches", type=int, default=6, help="trainings per search at most (default: 6)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds (default: 0)")
    p.add_argument("--held-out", type=int, default=50_000, help="rows held out (default: 50000)")
    p.add_argument("--threads", type=int, default=1, help="threads (default: 1)")
    p.add_argument("--cache", type=Path, help="folder for harvested activations")
    return p


def main(words:list[str]|None=None) -> dict:
    "Measure and report; with --out the file grows with every training."
    a = parser().parse_args(words)
    if a.tokens < 2 * a.batch: raise SystemExit(f"{a.tokens} tokens are less than two batches of {a.batch}: give more tokens, or a smaller --batch.")
    torch.set_num_threads(a.threads)
    if "sae_lens" in missing(): print("SAELens is not installed here: this measures only ours (python bench/peers.py makes an environment that has it).", file=sys.stderr)
    sets: dict[str, dict] = {}
    def save(found):
        sets[found["data"]] = found
        keep_unfinished("end_to_end", {"data": list(sets.values())}, a.out)
    for data in a.data: sets[data] = measure(data, a, save)
    a.cache = None                                                          # nobody else's folder
    return report("end_to_end", {"data": list(sets.values())}, a, PACKAGES)


if __name__ == "__main__": main()
