"""The contestants of `step.py`, `inference.py` and `memory.py`, all at the same weights on the same data, and how they are timed.

Ours is `Trainer.step`, everything included. Theirs are SAELens (sl_), dictionary_learning (dl_) and sparsify (sp_), imported when first asked for;
`ref_` is a step in plain torch without autograd, a yardstick that does nothing but what it must; `floor` is one dense encoder product in float32.

Data: sums of `l0` unit directions out of `d_sae` with power-law frequencies and sizes 1 + Exp(1), plus noise, scaled to E‖x‖² = d_in. Every SAE starts at the
true dictionary, thresholds at the one value that lets l0 latents per token through, and learns so slowly that it stays there: nobody is timed in a
degenerate state, and the report gives the L0 of each."""
from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib
import importlib.util
import inspect
import os
import random
import subprocess
import sys
import tempfile
import textwrap
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles
from typing import Any

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", "Sparse CSR tensor support")

import torch
import torch.nn.functional as F
from torch import Tensor
from _common import cores, report

try: import resource
except ImportError: resource = None

ALLOCATOR = dict(MALLOC_MMAP_THRESHOLD_="8589934592", MALLOC_TRIM_THRESHOLD_="17179869184", MALLOC_TOP_PAD_="1073741824")
MODULES = {"sl": "sae_lens", "dl": "dictionary_learning", "sp": "sparsify"}
PACKAGES = ("sae-lens", "dictionary-learning", "eai-sparsify", "triton", "numba")
BATCHES = 3                                                                # that take turns


# -- the problem -----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    "How large it all is."
    d_in: int
    d_sae: int
    batch: int
    l0: int = 48

    @classmethod
    def read(cls, text:str, l0:int=48) -> Shape:
        "512,8192,1024 or 512,8192,1024,48"
        try: numbers = [int(t) for t in text.split(",")]
        except ValueError: numbers = []
        if len(numbers) not in (3, 4) or min(numbers, default=0) < 1: raise argparse.ArgumentTypeError(f"{text!r} is not a shape: write d_in,d_sae,batch or d_in,d_sae,batch,l0, as in 512,8192,1024")
        s = cls(*numbers) if len(numbers) == 4 else cls(*numbers, l0)
        if s.l0 >= s.d_sae: raise argparse.ArgumentTypeError(f"an L0 of {s.l0} needs more than {s.d_sae} latents: write it as fourth number")
        return s

    def __str__(self): return f"d_in {self.d_in}, d_sae {self.d_sae}, batch {self.batch}, L0 {self.l0}"
    @property
    def word(self) -> str: return f"{self.d_in},{self.d_sae},{self.batch},{self.l0}"
    @property
    def table(self) -> int: return self.batch * self.d_sae
    @property
    def flop(self) -> int: return 2 * self.table * self.d_in


@dataclass
class Problem:
    "Batches, the dictionary they are made of, and the threshold that gives the wanted L0."
    shape: Shape
    dead: float = 0.                                                       # share of the latents declared dead
    seed: int = 0
    batches: int = BATCHES
    device: str = "cpu"
    W: Tensor = field(init=False, repr=False)                              # (d_sae, d_in) unit rows
    x: list[Tensor] = field(init=False, repr=False)
    theta: float = field(init=False)

    def __post_init__(self):
        from jumprelu_nb.sae.model import threshold_for_l0
        s, g, on = self.shape, torch.Generator(self.device).manual_seed(self.seed), dict(device=self.device)
        self.W = F.normalize(torch.randn(s.d_sae, s.d_in, generator=g, **on), dim=1)
        p = 1 / (torch.arange(s.d_sae, dtype=torch.float, **on) + 50)**.6
        p = p[torch.randperm(s.d_sae, generator=g, **on)]
        x = []
        for _ in range(self.batches):
            at = torch.multinomial(p.expand(s.batch, s.d_sae), s.l0, generator=g)
            a = 1 + torch.empty(s.batch, s.l0, **on).exponential_(generator=g)
            x.append(F.embedding_bag(at, self.W, per_sample_weights=a, mode="sum") + .05 * torch.randn(s.batch, s.d_in, generator=g, **on))
        scale = (s.d_in / torch.cat(x).square().sum(1).mean()).sqrt()
        self.x = [b * scale for b in x]
        rows = max(32, min(s.batch, 2**24 // s.d_sae))
        self.theta = threshold_for_l0(self.x[0][:rows] @ self.W.T, s.l0)   # midway between two values: no entry sits on it

    @cached_property
    def W_T(self) -> Tensor: return self.W.T.contiguous()
    @property
    def n_dead(self) -> int: return int(self.dead * self.shape.d_sae)

    @cached_property
    def relative_bandwidth(self) -> float:
        "What our advisor proposes for the recipe `practical`, as it does at the start of any training."
        from jumprelu_nb.train.advisor import advise
        from jumprelu_nb.train.recipes import get_recipe
        s = self.shape
        return advise(self.x[0][:max(64, min(s.batch, 2**23 // s.d_sae))].cpu(), get_recipe("practical", l0=float(s.l0), batch_size=s.batch), s.d_sae, 2_000_000).relative_bandwidth


# -- contestants -----------------------------------------------------------------------------------------------------------------
class Contestant:
    "Somebody who takes a training step on a batch."
    note = ""                                                              # what the reader of the row should know

    def step(self, x:Tensor) -> None: raise NotImplementedError
    def l0(self, x:Tensor) -> float|None: return None                      # after the race, not timed
    def more(self) -> dict[str, Any]: return {}                            # further columns


class Floor(Contestant):
    "One dense float32 product x W_enc into memory that is already there."
    def __init__(self, p:Problem): self.W, self.out = p.W_T, torch.empty(p.shape.batch, p.shape.d_sae, device=p.device)
    def step(self, x): torch.mm(x, self.W, out=self.out)


def loops_room():
    "The module with the compiled loops, if this version of the library has one."
    return importlib.import_module("jumprelu_nb.sae.loops") if importlib.util.find_spec("jumprelu_nb.sae.loops") else None


def screens() -> bool:
    "Does this version of the library screen in low precision?"
    from jumprelu_nb.sae.sparse import codes_of
    return "screen" in inspect.signature(codes_of).parameters


OURS = dict(jumprelu=("practical", dict(l0_start=1.)),
            beta0=("practical", dict(l0_start=1., betas=(0., .999))),
            l0=("practical", dict(objective="l0", steer=False, parametrisation="raw", relative_bandwidth=None)),
            topk=("topk", dict(l0_start=1.)), batchtopk=("batch_topk", dict(l0_start=1.)))


class Ours(Contestant):
    """`Trainer.step` of this library: schedule of the learning rates, scale, encoding, losses, gradients, projection, Adam, controller, statistics.

    jumprelu and beta0: the recipe `practical`, its bandwidth by the advisor as in any training of two million tokens; l0: the penalty and the bandwidth of SAELens (λ mean L0, window .05 at E‖x‖² = d_in)."""
    def __init__(self, p:Problem, kind:str="jumprelu", screen:str="auto", form:str|None=None, device:str="cpu", loops:bool=True):
        from jumprelu_nb.data.activations import Activations
        from jumprelu_nb.train import trainer as room
        self.loops = loops
        from jumprelu_nb.train.recipes import get_recipe
        s, (name, fields) = p.shape, OURS[kind]
        rows = torch.cat(p.x).cpu()
        scale = rows.square().sum(-1).mean().sqrt().item()
        theta = p.theta / scale
        fields = fields | dict(l0=float(s.l0), batch_size=s.batch, lr=1e-5, lr_threshold=1e-6, coefficient=1e-4 / scale**2)
        if "topk" not in kind: fields["threshold"] = theta
        if kind == "l0": fields["bandwidth"] = .05 / scale
        elif "topk" not in kind: fields["relative_bandwidth"] = p.relative_bandwidth
        else: fields["relative_bandwidth"] = .5                            # such gates have none
        if p.n_dead: fields["auxiliary"] = ("auxk",)
        self.room = room
        with self._loops(): self.trainer = room.Trainer(Activations.from_tensor(rows), get_recipe(name, **fields), s.d_sae, 10**10, 0, device)
        self.trainer.sample = self.trainer.acts = self.trainer.loader = None   # data, and no part of the step
        sae = self.trainer.sae
        with torch.no_grad():
            sae.W_dec.copy_(p.W); sae.W_enc.copy_(p.W_T); sae.b_enc.zero_(); sae.b_dec.zero_()
            if "topk" not in kind: sae.gate.set_threshold_(theta)
        self.batch, self.n_dead, self.listed = s.batch, p.n_dead, None
        self._force(screen, form)

    @contextlib.contextmanager
    def _loops(self):
        "With compiled loops where numba is installed, or all in torch."
        if self.loops or (room := loops_room()) is None: yield; return
        was = room.compiled()
        room.compiled(False)
        try: yield
        finally: room.compiled(was)

    def like(self, screen:str="auto", form:str|None=None) -> Ours:
        "The same trainer, asked to encode in another way."
        other = copy.copy(self)
        other._force(screen, form)
        return other

    def _force(self, screen, form):
        from jumprelu_nb.sae.sparse import codes_of
        wanted = ({} if screen == "auto" else {"screen": screen}) | ({} if form is None else {"form": form})
        parameters = inspect.signature(codes_of).parameters
        self.note, self.forced, self.codes_of = "", None, codes_of
        if unknown := [k for k in wanted if k not in parameters]: self.note = f"measured without {', '.join(f'{k}={wanted.pop(k)!r}' for k in unknown)}, which this version of codes_of does not take"
        if not wanted: return
        order = list(parameters)
        def forced(*args, **named):
            self.forced += 1
            return codes_of(**(dict(zip(order, args)) | named | wanted))
        self.forced, self.codes_of = 0, forced

    def step(self, x):
        if self.n_dead: self.trainer.silent_for[-self.n_dead:] = 1e12
        was, self.room.codes_of = self.room.codes_of, self.codes_of
        try:
            with self._loops(): return self._seen(self.trainer.step(x))
        finally: self.room.codes_of = was

    def _seen(self, codes): self.listed = None if codes.at is None else len(codes.at)

    def l0(self, x):
        seen = []
        self._seen = seen.append
        try: self.step(x)
        finally: del self._seen
        self._seen(seen[0])
        return seen[0].l0.item()

    def more(self):
        if self.forced == 0: self.note = "the trainer did not ask codes_of, so its form and screen were not ours to set"
        return {"listed_per_token": round(self.listed / self.batch, 1) if self.listed is not None else None, "compiled_loops": bool(self.loops and (room := loops_room()) and room.compiled()), "relative_bandwidth": self.trainer.recipe.relative_bandwidth}


class SAELens(Contestant):
    "SAELens's own trainer; its defaults but for what the title says."
    def __init__(self, p:Problem, kind:str, device:str="cpu", autocast:bool=False, compiled:bool=False):
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer
        s = p.shape
        base = dict(d_in=s.d_in, d_sae=s.d_sae, dtype="float32", device=device)
        if kind == "jumprelu":
            from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE as SAE, JumpReLUTrainingSAEConfig as Config
            config = Config(**base, jumprelu_init_threshold=p.theta, l0_coefficient=1e-4)
        elif kind == "batchtopk":
            from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE as SAE, BatchTopKTrainingSAEConfig as Config
            config = Config(**base, k=s.l0)
        else:
            from sae_lens.saes.topk_sae import TopKTrainingSAE as SAE, TopKTrainingSAEConfig as Config
            sparse = kind == "topk_sparse"                                 # fails in the backward pass with the rescaling on
            config = Config(**base, k=s.l0, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse)
        self.sae = SAE(config)
        self.sae.W_dec.data.copy_(p.W); self.sae.W_enc.data.copy_(p.W_T)
        self.trainer = SAETrainer(SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=s.batch, lr=1e-5, lr_end=1e-6, device=device, autocast=autocast), self.sae, iter(()))
        if compiled: self.sae.training_forward_pass = torch.compile(self.sae.training_forward_pass)   # as its runner does
        self.n_dead = p.n_dead

    def step(self, x):
        if self.n_dead: self.trainer.n_forward_passes_since_fired[-self.n_dead:] = 1e9
        self._seen(self.trainer.step(x)); self.trainer.n_training_steps += 1

    def _seen(self, output): pass                                          # and let it go: nobody keeps a table for the next step

    def l0(self, x):
        seen = []
        self._seen = lambda output: seen.append(output.feature_acts.detach())
        try: self.step(x)
        finally: del self._seen
        f = seen[0].to_dense() if seen[0].is_sparse else seen[0]
        return (f != 0).sum(1).float().mean().item()


def stub_nnsight() -> None:
    "dictionary_learning imports nnsight for its language models, which its trainers never use."
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        stub = types.ModuleType("nnsight"); stub.LanguageModel = object
        sys.modules["nnsight"] = stub


class DictionaryLearning(Contestant):
    "The trainers of dictionary_learning, past their warm-ups."
    def __init__(self, p:Problem, kind:str, device:str="cpu"):
        stub_nnsight()
        import dictionary_learning.trainers as T
        s, self.kind, self.n_dead, self.n = p.shape, kind, p.n_dead, 2000
        common = dict(steps=10**7, activation_dim=s.d_in, dict_size=s.d_sae, layer=0, lm_name="none", device=device, lr=1e-5)
        if kind == "jumprelu":
            self.trainer = T.JumpReluTrainer(target_l0=s.l0, **common)     # bandwidth .001
            sae = self.trainer.ae
            sae.W_dec.data.copy_(p.W); sae.W_enc.data.copy_(p.W_T); sae.threshold.data.fill_(p.theta)
        else:
            self.trainer = dict(topk=T.TopKTrainer, batchtopk=T.BatchTopKTrainer, gated=T.GatedSAETrainer)[kind](**common, **({} if kind == "gated" else {"k": s.l0}))
            sae = self.trainer.ae
            sae.decoder.weight.data.copy_(p.W_T); sae.encoder.weight.data.copy_(p.W)
            if kind == "gated": sae.gate_bias.data.fill_(-p.theta)
        self.sae = sae

    def step(self, x):
        if self.n_dead and hasattr(self.trainer, "num_tokens_since_fired"): self.trainer.num_tokens_since_fired[-self.n_dead:] = 10**9
        self.trainer.update(self.n, x); self.n += 1

    @torch.no_grad()
    def l0(self, x): return ((self.sae.encode(x, use_threshold=False) if self.kind == "batchtopk" else self.sae.encode(x)) != 0).sum(1).float().mean().item()


class Sparsify(Contestant):
    "The loop of sparsify.trainer.Trainer for one hookpoint with its default loss (fvu), written out."
    def __init__(self, p:Problem, kind:str):
        import io
        with contextlib.redirect_stdout(io.StringIO()):                    # it prints that there is no Triton
            from sparsify.config import SparseCoderConfig
            from sparsify.sparse_coder import SparseCoder
        s, self.n_dead = p.shape, p.n_dead
        self.sae = SparseCoder(s.d_in, SparseCoderConfig(num_latents=s.d_sae, k=s.l0))
        self.sae.encoder.weight.data.copy_(p.W); self.sae.W_dec.data.copy_(p.W)
        if kind == "topk_adam": self.opt = torch.optim.Adam(self.sae.parameters(), lr=1e-5)
        else:
            from schedulefree import ScheduleFreeWrapper
            from sparsify.sign_sgd import SignSGD
            self.opt = ScheduleFreeWrapper(SignSGD([dict(params=self.sae.parameters(), lr=1e-5)]), momentum=.95); self.opt.train()
        self.since, self.fired = torch.zeros(s.d_sae, dtype=torch.long), torch.zeros(s.d_sae, dtype=torch.bool)
        self.mask = torch.zeros_like(self.fired) if self.n_dead else None
        if self.n_dead: self.mask[-self.n_dead:] = True

    def step(self, x):
        sae = self.sae
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=x, y=x, dead_mask=self.mask, total_variance=(x - x.mean(0)).pow(2).sum())
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.opt.step(); self.opt.zero_grad()
        with torch.no_grad(): self.since += len(x); self.since[self.fired] = 0; self.fired.zero_()

    @torch.no_grad()
    def l0(self, x): return (self.sae(x).latent_acts > 0).sum(1).float().mean().item()


# -- a step in plain torch -------------------------------------------------------------------------------------------------------
def csr(crow, col, val, shape): return torch.sparse_csr_tensor(crow, col, val, shape, check_invariants=False)
def bag(at, W, starts, v): return F.embedding_bag(at, W, starts, mode="sum", per_sample_weights=v)


def ends(at:Tensor, n:int) -> Tensor:
    "(n + 1,) where the entries of each of n sorted groups begin."
    return F.pad(torch.bincount(at, minlength=n).cumsum(0), (1, 0))


def places(mask:Tensor) -> Tensor:
    "Flat positions of the True entries of a table: eight are tested at a time on a CPU."
    if mask.device.type != "cpu" or mask.numel() % 8: return mask.view(-1).nonzero().squeeze(1)
    words = mask.view(torch.int64).view(-1); at = words.nonzero().squeeze(1)
    inner = words[at].view(torch.bool).view(-1, 8).nonzero()
    return at[inner[:, 0]] * 8 + inner[:, 1]


class Screen:
    """Entries above a limit, found by a bfloat16 product with a proven margin and computed again in float32.

    |x·w − x̃·w̃| ≤ |x − x̃||w| + u|x̃||w| with u = 2⁻⁸, plus the rounding of sums in float32. Margin and limit enter the product as further columns, so that its sign decides."""
    def __init__(self, batch, d_sae, d, device="cpu"):
        self.m, self.d, self.gamma = d_sae, d, (d + 8) * 2.**-23
        half = dict(dtype=torch.bfloat16, device=device)
        self.out = torch.empty(batch, d_sae, **half)
        self.x, self.w = (torch.zeros(n, -(-(d + 3) // 32) * 32, **half) for n in (batch, d_sae))
        self.x[:, d + 1:d + 3] = 1

    @staticmethod
    def up(z): return (z * (1 + 2.**-7)).bfloat16()

    def weights(self, W, b, low):
        self.W, self.b, self.low, d = W, b, low, self.d
        t = low - b; t = t - t.abs() * (2.**-14 + self.gamma); high = t.bfloat16()       # the limit in two pieces, rounded downwards
        self.w[:, :d] = W; self.w[:, d] = self.up(W.norm(dim=1)); self.w[:, d + 1] = -high; self.w[:, d + 2] = -(t - high.float()).bfloat16()
        return self

    def __call__(self, x):
        d, n = self.d, len(x); a = self.x[:n]
        a[:, :d] = x; near = a[:, :d].float(); a[:, d] = self.up((x - near).norm(dim=1) + (2.**-8 + 2 * self.gamma) * near.norm(dim=1))
        at = places(torch.mm(a, self.w.T, out=self.out[:n]).view(torch.int16) >= 0)
        r = at.div(self.m, rounding_mode="floor"); c = at - r * self.m
        v = torch.sparse.sampled_addmm(csr(ends(r, n), c, torch.zeros(len(at), device=x.device), (n, self.m)), x, self.W.T, beta=0.).values() + self.b[c]
        keep = (v > self.low[c]).nonzero().squeeze(1)
        return r[keep], c[keep], v[keep]


class Reference(Contestant):
    "JumpReLU with the penalty, bandwidth and gradient clipping of SAELens, written out for the few entries that count: one dense product, then lists; fused Adam, firing statistics, no auxiliary loss."
    def __init__(self, p:Problem, screen:bool=False, window:float=.05, price:float=1e-4, device:str="cpu"):
        s = p.shape
        start = p.W.clone(), p.W.clone(), torch.zeros(s.d_sae), torch.zeros(s.d_in), torch.full((s.d_sae,), p.theta)
        self.P = [torch.nn.Parameter(t.to(device)) for t in start]
        self.opt = torch.optim.Adam(self.P, lr=1e-5, fused=True)
        self.window, self.price, self.m = window, price, s.d_sae
        self.since, self.freq = torch.zeros(s.d_sae, device=device), torch.zeros(s.d_sae, device=device)
        self.screen = Screen(s.batch, s.d_sae, s.d_in, device) if screen else None
        self.out = None if screen else torch.empty(s.batch, s.d_sae, device=device)
        if p.n_dead: self.note = "has no auxiliary loss"

    def candidates(self, x):
        W, _, b, _, theta = self.P
        low = theta - self.window / 2
        if self.screen: return self.screen.weights(W, b, low)(x)
        z = torch.addmm(b, x, W.T, out=self.out)
        at = places(z > low); r = at.div(self.m, rounding_mode="floor")
        return r, at - r * self.m, z.view(-1)[at]

    @torch.no_grad()
    def step(self, x0):
        (W, D, b, c0, theta), B, m = self.P, len(x0), self.m
        x = x0 - c0
        r, c, v = self.candidates(x)                                       # active, or inside the window
        t = theta[c]; on = v > t; near = (v - t).abs() < self.window / 2
        crow = ends(r, B); f = torch.where(on, v, 0.)
        g = (bag(c, D, crow[:-1], f) + c0 - x0) * (2 / B)
        G = torch.sparse.sampled_addmm(csr(crow, c, torch.zeros_like(v), (B, m)), g, D.T, beta=0.).values()
        gz = torch.where(on, G, 0.); gt = torch.where(near, -(t * G + self.price / B) / self.window, 0.)
        order = torch.argsort(c); starts = ends(c[order], m)[:-1]; ro = r[order]
        D.grad, W.grad = bag(ro, g, starts, f[order]), bag(ro, x, starts, gz[order])
        b.grad, theta.grad = torch.zeros_like(b).index_add_(0, c, gz), torch.zeros_like(theta).index_add_(0, c, gt)
        c0.grad = g.sum(0) - b.grad @ W
        fired = c[on]; self.since += B; self.since[fired] = 0; self.freq += torch.bincount(fired, minlength=m)
        torch.nn.utils.clip_grad_norm_(self.P, 1.)
        self.opt.step()
        theta.clamp_(min=0)
        self.counts = len(fired), len(v)

    def l0(self, x): self.step(x); self.batch = len(x); return self.counts[0] / len(x)
    def more(self): return {"listed_per_token": round(self.counts[1] / self.batch, 1)}


# -- who there is ----------------------------------------------------------------------------------------------------------------
TITLES = {
    "floor": "one dense product", "ours": "ours: practical", "ours_float32": "ours: practical, float32", "ours_screened": "ours: practical, screened", "ours_torch": "ours: practical, without compiled loops",
    "ours_beta0": "ours: practical, β₁ = 0", "ours_beta0_float32": "ours: practical, β₁ = 0, float32", "ours_beta0_screened": "ours: practical, β₁ = 0, screened",
    "ours_l0": "ours: L0 penalty", "ours_l0_float32": "ours: L0 penalty, float32", "ours_l0_screened": "ours: L0 penalty, screened", "ours_topk": "ours: TopK", "ours_batchtopk": "ours: BatchTopK",
    "ref_float32": "plain torch, float32", "ref_screened": "plain torch, screened",
    "sl_jumprelu": "SAELens JumpReLU", "sl_topk": "SAELens TopK", "sl_topk_sparse": "SAELens TopK, sparse activations, no rescaling", "sl_batchtopk": "SAELens BatchTopK",
    "dl_jumprelu": "dictionary_learning JumpReLU", "dl_topk": "dictionary_learning TopK", "dl_batchtopk": "dictionary_learning BatchTopK", "dl_gated": "dictionary_learning Gated",
    "sp_topk_adam": "sparsify TopK, Adam", "sp_topk_signum": "sparsify TopK, signum (its default)"}
TRAINING = [n for n in TITLES if "beta0" not in n]                            # who runs unless told otherwise
FURTHER = ["ours_l0_torch", "ours_beta0_torch", "ours_topk_float32", "ours_topk_screened", "ours_batchtopk_float32", "ours_batchtopk_screened"]


def listed(names:list[str]) -> str:
    "Names for the end of a help text."
    return "\n  " + "\n  ".join(textwrap.wrap(", ".join(names) + ".", 140))


def title(name:str) -> str: return TITLES.get(name) or name.replace("_", " ")


def build(name:str, p:Problem) -> Contestant:
    "Make a contestant from its name."
    if name == "floor": return Floor(p)
    if name.startswith("ref_"): return Reference(p, screen=name == "ref_screened")
    head, _, kind = name.partition("_")
    if head in MODULES: return dict(sl=SAELens, dl=DictionaryLearning, sp=Sparsify)[head](p, kind)
    rest, _, last = kind.rpartition("_")
    how = {"float32": dict(screen="off"), "screened": dict(screen="on"), "torch": dict(loops=False)}.get(last)
    return Ours(p, (kind if how is None else rest) or "jumprelu", **(how or {}))


def missing() -> list[str]:
    "The peers' packages that are not installed."
    return [m for m in MODULES.values() if importlib.util.find_spec(m) is None]


def chosen(only:str|None, default:list[str], known:list[str]|None=None) -> list[str]:
    "Names to run, the floor first; says in one sentence if peers are left out."
    names = [n for n in (only.split(",") if only else default) if n != "floor"]
    if unknown := [n for n in names if n not in (known or [*TITLES, *FURTHER])]: raise SystemExit(f"There is no contestant {unknown[0]!r}: choose from {', '.join(known or [*TITLES, *FURTHER])}.")
    lost = missing()
    absent = [n for n in names if MODULES.get(n.split("_")[0]) in lost]
    if absent: print(f"Not installed here: {', '.join(lost)}; without {'them' if len(lost) > 1 else 'it'} this measures ours and the floor (python bench/peers.py makes an environment that has all).", file=sys.stderr)
    return ["floor", *(n for n in names if n not in absent)]


# -- the race --------------------------------------------------------------------------------------------------------------------
def faults() -> int: return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


@dataclass
class Times:
    "What each round cost a contestant."
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)


def timed(run:Callable[[Tensor], Any], x:Tensor) -> tuple[float, float, float]:
    "Processor seconds, wall seconds and page faults of one call."
    f, c, w = faults(), time.process_time(), time.perf_counter()
    run(x)
    return time.process_time() - c, time.perf_counter() - w, faults() - f


def race(contestants:dict[str, Contestant], batches:list[Tensor], rounds:int=7, warm:int=3, every:int=4) -> tuple[dict[str, Times], dict[str, str]]:
    """Run all in turns, in another order each round; the floor runs after every few of them, and its cost in a round is the median of these.

    Returns the times, and why somebody dropped out."""
    order, times, errors, dice = [n for n in contestants if n != "floor"], {n: Times() for n in contestants}, {}, random.Random(0)
    gc.collect(); gc.disable()
    try:
        for r in range(warm + rounds):
            x, floors, this = batches[r % len(batches)], [], {}
            dice.shuffle(order)
            for i, name in enumerate(order):
                if i % every == 0: floors.append(timed(contestants["floor"].step, x))
                if name in errors: continue
                try: this[name] = timed(contestants[name].step, x)
                except Exception as e: errors[name] = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else ''}"
            floors.append(timed(contestants["floor"].step, x))
            this["floor"] = tuple(median(f[k] for f in floors) for k in range(3))
            gc.collect()
            if r >= warm:
                for name, (c, w, f) in this.items():
                    t = times[name]; t.cpu.append(c); t.wall.append(w); t.faults.append(f)
    finally: gc.enable()
    return times, errors


def ratio(a:list[float], b:list[float]) -> float: return median(x / y for x, y in zip(a, b))


def rows_of(contestants:dict[str, Contestant], times:dict[str, Times], errors:dict[str, str], shape:Shape, x:Tensor) -> dict[str, dict[str, Any]]:
    "One row of the table per contestant."
    out, floor = {}, times["floor"]
    for name, c in contestants.items():
        t = times[name]
        if name in errors: out[name] = {"error": errors[name]}; continue
        xs = [a / b for a, b in zip(t.cpu, floor.cpu)]
        quarter = quantiles(xs, n=4) if len(xs) > 2 else [min(xs), median(xs), max(xs)]
        try: l0 = c.l0(x)
        except Exception as e: l0 = None; c.note = f"L0 not measured: {type(e).__name__}"
        out[name] = {"cpu_ms": round(1e3 * median(t.cpu), 3), "cpu_ms_min": round(1e3 * min(t.cpu), 3), "wall_ms": round(1e3 * median(t.wall), 3),
                     "x_floor": round(median(xs), 3), "x_floor_quartiles": [round(quarter[0], 3), round(quarter[2], 3)], "x_floor_wall": round(ratio(t.wall, floor.wall), 3),
                     "tokens_per_cpu_second": round(shape.batch / median(t.cpu)), "page_faults": round(median(t.faults)), "l0": None if l0 is None else round(l0, 1), **c.more()}
        if c.note: out[name]["note"] = c.note
    return out


def speedups(times:dict[str, Times], errors:dict[str, str], clock:str="cpu") -> dict[str, dict[str, float]]:
    "Per version of ours: how many times as long each other one takes, as the median over rounds."
    fine = [n for n in times if n not in errors and times[n].cpu and n != "floor"]
    return {o: {n: round(ratio(getattr(times[n], clock), getattr(times[o], clock)), 2) for n in fine if not n.startswith("ours")} for o in fine if o.startswith("ours")}


def show(shape:Shape, rows:dict[str, dict[str, Any]], head:str="") -> None:
    "Print a table for the eye."
    f = rows["floor"]
    print(f"\n{shape}{head}; floor {f['cpu_ms']:.2f} ms = {shape.flop / f['cpu_ms'] / 1e6:.0f} GFLOP/s", file=sys.stderr)
    print(f"{'':46} {'× floor':>8} {'quartiles':>14} {'× (wall)':>9} {'cpu ms':>9} {'wall ms':>9} {'faults':>8} {'L0':>6} {'listed':>7}", file=sys.stderr)
    for name, r in rows.items():
        if "error" in r: print(f"{title(name):46} dropped out: {r['error']}", file=sys.stderr); continue
        low, high = r["x_floor_quartiles"]
        print(f"{title(name):46} {r['x_floor']:8.2f} {low:6.2f} –{high:6.2f} {r['x_floor_wall']:9.2f} {r['cpu_ms']:9.2f} {r['wall_ms']:9.2f} {r['page_faults']:8} {'' if r['l0'] is None else r['l0']:>6} {r.get('listed_per_token') or '':>7}"
              + (f"  ({r['note']})" if r.get("note") else ""), file=sys.stderr)


# -- one process per setting -----------------------------------------------------------------------------------------------------
def environment(threads:int, allocator:bool) -> dict[str, str]:
    "Environment of a measuring process: what it needs to run with so many threads, with or without glibc keeping large blocks."
    env = {k: v for k, v in os.environ.items() if k not in ALLOCATOR} | (ALLOCATOR if allocator else {})
    return env | {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def allocator_set() -> bool: return all(os.environ.get(k) == v for k, v in ALLOCATOR.items())


def elsewhere(script:str|Path, words:list[str], threads:int=1, allocator:bool=False) -> Any:
    "Run a script in a process of its own, with `--json-to FILE` as last words; returns what it wrote there."
    import json
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"result.json"
        root = str(Path(__file__).resolve().parent.parent)
        env = environment(threads, allocator) | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        done = subprocess.run([sys.executable, str(script), *words, "--json-to", str(path)], env=env, stdout=subprocess.DEVNULL)
        if done.returncode or not path.exists(): return {"error": f"the process ended with code {done.returncode}"}
        return json.loads(path.read_text(encoding="utf-8"))


def hand_over(path:Path, result:Any) -> None:
    import json
    path.write_text(json.dumps(result), encoding="utf-8")


def tables_of(script:str|Path, measure:Callable[..., dict], args:argparse.Namespace, shapes:list[Shape], names:list[str], known:list[str]|None=None, further:tuple[str, ...]=(), **marks:Any) -> list[dict]|None:
    """One table per shape, number of threads and allocator setting, each in a process of its own; here, if there is only one and this process has its setting.

    `further` are words for those processes, `marks` what is written beside their tables. None: this is such a process, and has handed its table over."""
    if max(args.threads) > cores(): print(f"{max(args.threads)} threads on {cores()} cores measure waiting.", file=sys.stderr)
    settings = {"off": [False], "on": [True], "both": [False, True]}[args.malloc]
    if args.json_to: return hand_over(args.json_to, measure(shapes[0], args))
    chosen(args.only, names, known)                                        # complains now, not in every process
    if len(shapes) == len(settings) == len(args.threads) == 1 and settings[0] == allocator_set(): return [measure(shapes[0], args)]
    same = [*(["--only", args.only] if args.only else []), "--rounds", str(args.rounds), "--warm", str(args.warm), *further]
    return [elsewhere(script, ["--shape", s.word, "--threads", str(t), *same], t, keep) | {"shape": s.word, "threads": t, "allocator_setting": keep, **marks} for s in shapes for t in args.threads for keep in settings]


# -- what is written -------------------------------------------------------------------------------------------------------------
def keep_unfinished(name:str, results:dict[str, Any], out:Path|None) -> None:
    "Write what is known so far where `--out` says, so that nothing is lost."
    import json
    if not out: return
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps({"benchmark": name, "unfinished": True, "results": results}, indent=1), encoding="utf-8"); os.replace(part, out)


def reported(name:str, results:dict[str, Any], args:argparse.Namespace, shapes:list[Shape]) -> dict[str, Any]:
    "Report, with the shapes as they are written on the command line."
    args.shape = [s.word for s in shapes]
    return report(name, results, args, PACKAGES)
