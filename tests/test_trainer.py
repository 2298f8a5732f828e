"What protects the training chapter: every recipe reaches its sparsity, and the loop keeps its promises about groups, clocks and files."
import copy
import json
import math
import warnings

import pytest
import torch
from torch.nn.functional import normalize
from jumprelu_nb.data.activations import Activations
from jumprelu_nb.train.build import lr_factor
from jumprelu_nb.train.recipes import RECIPES, Recipe, get_recipe
from jumprelu_nb.train.trainer import Trainer, read_log, train


@pytest.fixture(scope="module")
def toy():
    g = torch.Generator().manual_seed(5)
    truth = normalize(torch.randn(60, 24, generator=g), dim=-1)
    return ((torch.rand(60_000, 60, generator=g) < .05) * (.5 + torch.rand(60_000, 60, generator=g))) @ truth + .3


def quiet(*a, **k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(*a, progress=False, **k)


def measure(sae, x):
    f = sae.encode(x)
    return (f != 0).sum(-1).float().mean().item(), ((sae.decode(f) - x).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.parametrize("name, tolerance", [("practical", .02), ("topk", .12), ("relu_l1", .15)])
@pytest.mark.parametrize("l0", [3, 6])
def test_recipes_reach_their_l0(toy, name, tolerance, l0):
    run = quiet(toy, recipe=name, d_sae=96, l0=l0, tokens=300_000, batch_size=512)
    got, fvu = measure(run.sae, toy[:20_000])
    assert got == pytest.approx(l0, rel=tolerance), f"{name} ends at L0 {got:.2f}"
    if name == "topk": assert got <= l0 + 1e-6
    assert fvu < (.6 if name == "relu_l1" else .3), f"{name}: FVU {fvu:.3f}"


def test_jumprelu_shrinks_nothing_and_relu_does(toy):
    gamma = {}
    for name in ("practical", "relu_l1"):
        sae = quiet(toy, recipe=name, d_sae=96, l0=3, tokens=300_000, batch_size=512).sae
        x_hat = sae(toy[:20_000]) - toy.mean(0); x = toy[:20_000] - toy.mean(0)
        gamma[name] = (x_hat.square().sum() / (x_hat * x).sum()).item()
    assert gamma["practical"] == pytest.approx(1, abs=.03) and gamma["relu_l1"] < .9


def test_clipping_leaves_thresholds_alone(toy):
    "a clip that stops the weights dead does not slow the thresholds"
    runs = {}
    for clip in (None, 1e-12):
        t = Trainer(Activations.from_tensor(toy), get_recipe(l0=4., batch_size=512, grad_clip=clip, l0_gain=0.), 96, 100_000)
        w, theta = t.sae.W_enc.detach().clone(), t.sae.gate.param.detach().clone()
        it = iter(t.loader)
        for _ in range(5): t.step(next(it))
        runs[clip] = (t.weights[0] - w).abs().mean().item(), (t.sae.gate.param - theta).abs().mean().item()
    assert runs[1e-12][1] > .3 * runs[None][1] > 0


def test_learning_rates_follow_the_clock(toy):
    r = get_recipe(l0=4., batch_size=1000)
    t = Trainer(Activations.from_tensor(toy), r, 64, 100_000)
    it, seen = iter(t.loader), []
    for _ in range(100):
        t.step(next(it)); seen.append([g["lr"] for g in t.opt.param_groups])
    for step in (0, 4, 50, 69, 85, 99):
        f = lr_factor(r, (step + .5) / 100, 100_000)
        assert seen[step] == pytest.approx([t.base_lr * f, r.lr_threshold * f])
    assert seen[99][0] < .02 * t.base_lr and seen[50][0] == pytest.approx(t.base_lr)


def test_the_log_is_complete_and_finite(toy, tmp_path):
    run = quiet(toy, d_sae=64, l0=4, tokens=60_000, batch_size=512, out=tmp_path/"a")
    log = read_log(tmp_path/"a")
    assert [r["tokens"] for r in log] == [r["tokens"] for r in run.log] and log[-1]["tokens"] >= 60_000
    for r in log:
        assert {"tokens", "seconds", "l0", "fvu", "dead", "theta_50", "theta_moved", "in_window", "price", "tokens_per_second"} <= r.keys()
        assert all(math.isfinite(v) for v in r.values())
    cfg = json.loads((tmp_path/"a"/"cfg.json").read_text())
    assert cfg["metadata"]["recipe"]["name"] == "practical" and Recipe("x").but(**cfg["metadata"]["recipe"]) == run.recipe


def test_training_goes_on_after_bfloat16_like_inputs(toy):
    x = toy.to(torch.bfloat16)
    got, fvu = measure(quiet(x, d_sae=64, l0=4, tokens=60_000, batch_size=512).sae, toy)
    assert fvu < .5


def test_every_recipe_steps(toy):
    for name in RECIPES:
        t = Trainer(Activations.from_tensor(toy), get_recipe(name, **({} if RECIPES[name].l0 is None else {"l0": 4.}), batch_size=256), 64, 10_000)
        it = iter(t.loader)
        for _ in range(3): t.step(next(it))
        assert all(p.isfinite().all() for p in t.sae.parameters())


def test_state_is_all_a_step_depends_on(toy):
    "two trainers with the same state go on alike, to the bit"
    make = lambda: Trainer(Activations.from_tensor(toy), get_recipe(l0=4., batch_size=512), 64, 60_000)
    a = make(); it = iter(a.loader)
    for _ in range(7): a.step(next(it))
    b = make(); b.load_state_dict(copy.deepcopy(a.state_dict()))   # a file would have copied it
    other = iter(b.loader)
    for _ in range(7): a.step(next(it)); b.step(next(other))
    for p, q in zip(a.sae.parameters(), b.sae.parameters()): assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["practical", "batch_topk"])
def test_a_generator_that_can_be_read_once_trains_to_its_end(toy, name):
    "the rows of the last calibration are drawn before the training reads the rest"
    run = quiet((b for b in toy.split(5000)), recipe=name, d_sae=96, l0=4, tokens=30_000, batch_size=500)
    assert measure(run.sae, toy[:20_000])[0] == pytest.approx(4, rel=.2)
    with pytest.raises(ValueError, match="only once"): quiet((b for b in toy.split(5000)), d_sae=96, l0=4, tokens=90_000, batch_size=500)
