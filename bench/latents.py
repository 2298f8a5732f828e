"""What the statistics of every latent cost beyond the model's forward pass and the encoder, in time and in memory.

    python bench/latents.py                                          # 16,384 latents, L0 64, 200,000 tokens of the standard library
    python bench/latents.py --d-sae 16384 131072 --tokens 200000 50000 --out bench/results/latents.json

The model is the embedded one, stopped at the site. The SAE is a random dictionary around the mean of the activations, with one threshold that gives the wanted
L0 on a sample; latents then fire at very different rates, as those of a trained SAE do. Every size has a process of its own, which
1. runs forward and encoder alone over all batches (the floor);
2. runs the same batches with the statistics, what `collect` does; the difference in CPU seconds is what the statistics cost;
3. relates latents (partners, decoder neighbours, effects on logits), saves, opens and looks at latents, each timed alone.
Memory: bytes that the statistics hold, before and after, and the peak of the resident memory during 2 above that during 1: what the statistics need with
all that comes and goes while they are updated. Needs Linux for the peak."""
from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import argument_parser, report
from memory import reset_peak, settle, status

from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.interpret import latents as room
from jumprelu_nb.interpret.latents import LatentStats
from jumprelu_nb.sae import loops
from jumprelu_nb.sae.gates import JumpReLUGate
from jumprelu_nb.sae.model import SAE, threshold_for_l0
from jumprelu_nb.sae.sparse import encode_sparse


def made(lm, site:str, d_sae:int, l0:float, seed:int=0) -> SAE:
    "A random dictionary that lets `l0` latents per token through."
    from jumprelu_nb.data.activations import Activations
    x = Activations.from_lm(lm, site, text="stdlib").sample(4096)
    sae = SAE(x.shape[1], d_sae, JumpReLUGate(d_sae, 1.), metadata=dict(model_name=lm.name, site=site)).init_(seed)
    sae.b_enc.data.copy_(-x.mean(0) @ sae.W_enc)
    z = sae.pre_acts(x[:max(64, 2**26 // d_sae)])
    sae.gate.set_threshold_(threshold_for_l0(z, l0))
    return sae.fold()


def measure(d_sae:int, tokens:int, a) -> dict:
    "One size, in this process."
    torch.set_num_threads(1)
    if a.no_loops: loops.compiled(False)
    lm = LanguageModel.load(a.model)
    site = lm.site(a.site)
    sae = made(lm, a.site, d_sae, a.l0)
    T = lm.context_size
    per = max(1, min(4096, 2**26 // d_sae) // T)
    batches = list(room.batches_of(lm, room._documents("stdlib", "train", 0), T, per, tokens // T))
    n = sum(ids.numel() for ids, _ in batches)
    def floor(some):
        for ids, _ in some:
            at = room.keep_mask(lm, ids).flatten().nonzero().squeeze(1)
            encode_sparse(sae, lm.capture(ids, [site])[site.name].flatten(0, 1)[at])
    def fresh(): return LatentStats(d_sae, threshold=sae.threshold)
    with torch.no_grad():
        floor(batches[:2]); warm = fresh(); room.take(warm, sae, lm, site, *batches[0]); del warm               # compile, touch
        start = time.process_time(); floor(batches); bare = time.process_time() - start
        settle()
        before, peaked = status("VmRSS"), reset_peak()
        floor(batches[:8]); floor_peak = status("VmHWM") - before
        settle()
        before, peaked = status("VmRSS"), reset_peak()
        stats, at = fresh(), [time.process_time()]
        empty = stats.nbytes
        for ids, documents in batches: room.take(stats, sae, lm, site, ids, documents); at.append(time.process_time())
        peak = status("VmHWM") - before
    whole, half = at[-1] - at[0], len(batches) // 2
    later = (at[-1] - at[half]) - bare * (len(batches) - half) / len(batches)
    out = dict(d_sae=d_sae, d_in=sae.d_in, l0=round(float(stats.frequency.sum()), 1), alive=round(float(stats.alive.double().mean()), 3), tokens=n, tokens_per_batch=per * T,
               floor_cpu_s=round(bare, 2), with_statistics_cpu_s=round(whole, 2), tokens_per_second_beyond=round(n / max(whole - bare, 1e-9)), tokens_per_second_beyond_second_half=round(n / 2 / max(later, 1e-9)),
               statistics_mb=round(stats.nbytes / 2**20, 1), statistics_empty_mb=round(empty / 2**20, 1), peak_mb=round((peak - floor_peak) / 2**20, 1) if peaked else None, peak_of_floor_mb=round(floor_peak / 2**20, 1) if peaked else None, compiled_loops=loops.compiled())
    def timed(name, f): start = time.perf_counter(); r = f(); out[name] = round(time.perf_counter() - start, 4); return r
    timed("partners_s", lambda: stats.relate())
    if d_sae <= 2**15: timed("neighbours_s", lambda: stats.relate(sae)); timed("logit_effects_s", lambda: stats.relate(sae, lm, k=0))
    stats.strings = room.token_strings(lm, room.used_tokens(stats))
    with tempfile.TemporaryDirectory() as folder:
        path = timed("save_s", lambda: stats.save(folder))
        out["file_mb"] = round(path.stat().st_size / 2**20, 1)
        del stats; settle(); before = status("VmRSS")
        again = timed("open_s", lambda: LatentStats.load(folder))
        some = torch.randint(d_sae, (50,), generator=torch.Generator().manual_seed(0)).tolist()
        timed("fifty_latents_s", lambda: [again[i].index for i in some])
        timed("latents_of_token_s", lambda: again.latents_of(" import"))
        out["opened_mb"] = round((status("VmRSS") - before) / 2**20, 1)
    return out


def main(words:list[str]|None=None) -> dict|None:
    "Measure and report."
    p = argument_parser(__doc__)
    p.add_argument("--model", default="embedded")
    p.add_argument("--site", default="resid_post.2")
    p.add_argument("--d-sae", type=int, nargs="+", default=[16384])
    p.add_argument("--tokens", type=int, nargs="+", default=[200_000], help="one number, or one per size")
    p.add_argument("--l0", type=float, default=64.)
    p.add_argument("--no-loops", action="store_true", help="without compiled loops")
    p.add_argument("--json-to", type=Path, help="measure the first size in this process and write a plain result")
    a = p.parse_args(words)
    if a.json_to: a.json_to.write_text(json.dumps(measure(a.d_sae[0], a.tokens[0], a))); return None
    rows = []
    for i, d in enumerate(a.d_sae):
        with tempfile.TemporaryDirectory() as folder:
            to = Path(folder)/"row.json"
            subprocess.run([sys.executable, __file__, "--d-sae", str(d), "--tokens", str(a.tokens[min(i, len(a.tokens) - 1)]), "--l0", str(a.l0), "--model", a.model, "--site", a.site, "--json-to", str(to),
                            *(["--no-loops"] if a.no_loops else [])], check=True)
            rows.append(json.loads(to.read_text()))
    del a.json_to
    return report("latents", {"rows": rows}, a, ("numba", "safetensors", "scipy"))


if __name__ == "__main__": main()
