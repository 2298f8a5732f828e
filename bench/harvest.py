"""How fast activations are harvested, against the bare forward stopped at the same site.

    python bench/harvest.py [--model embedded] [--site resid_post.2] [--contexts 1024] [--rounds 5] [--out FILE]

Both run on the same contexts with the same number of contexts per pass, in turns; CPU seconds on a CPU, wall seconds elsewhere.
Prints JSON: tokens per second of each, and the median over the rounds of their ratio (1 = harvesting costs nothing beyond the forward)."""
from __future__ import annotations

import time
from statistics import median

import torch
from _common import argument_parser, report
from jumprelu_nb.data.activations import Activations
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.data.text import pack, texts

p = argument_parser(__doc__)
p.add_argument("--model", default="embedded")
p.add_argument("--site", default="resid_post.2")
p.add_argument("--text", default="stdlib")
p.add_argument("--contexts", type=int, default=1024)
p.add_argument("--batch-contexts", type=int, default=32)
p.add_argument("--rounds", type=int, default=5)
p.add_argument("--device")
p.add_argument("--threads", type=int, default=1)
a = p.parse_args()

torch.set_num_threads(a.threads)
lm = LanguageModel.load(a.model, device=a.device)
tokens = pack(lm, texts(a.text), max_tokens=a.contexts*lm.context_size)
acts = Activations.from_lm(lm, a.site, tokens, batch_contexts=a.batch_contexts)

def clock():
    if lm.device.type == "cpu": return time.process_time()
    getattr(torch, lm.device.type).synchronize()
    return time.perf_counter()

def bare():
    for t in tokens.split(a.batch_contexts): lm.capture(t, a.site)
    return tokens.numel()

batch = acts.n_rows//32                                   # a round of 32 batches is all contexts once, to within 31 rows
loader = acts.loader(batch, buffer_tokens=acts.n_rows)

def harvest():
    for _ in range(loader.per_round): next(loader)
    return tokens.numel()

def speed(run):
    start = clock()
    return run()/(clock() - start)

speed(bare), speed(harvest)
pairs = [(speed(bare), speed(harvest)) for _ in range(a.rounds)]
report("harvest", dict(
    model=a.model, site=a.site, device=str(lm.device), dtype=str(lm.dtype), contexts=len(tokens), context_size=tokens.shape[1],
    batch_contexts=a.batch_contexts, batch_size=batch, ratio=round(median(y/x for x, y in pairs), 3),
    bare_tokens_per_second=round(median(x for x, _ in pairs)), harvest_tokens_per_second=round(median(y for _, y in pairs))), a)
