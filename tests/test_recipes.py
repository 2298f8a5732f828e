"Every recipe of the catalogue trains, folds to one inference form, and refuses what cannot work."
import math
import warnings

import pytest
import torch
from jumprelu_nb.data.activations import Activations
from jumprelu_nb.data.pairs import pair_up
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.sparse import codes_of
from jumprelu_nb.train.build import learning_rate
from jumprelu_nb.train.recipes import RECIPES, Recipe, get_recipe
from jumprelu_nb.train.trainer import Trainer, train


def toy(n=6000, d=8, features=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(features, d, generator=g), dim=-1)
    return ((torch.rand(n, features, generator=g) < .08) * (.5 + torch.rand(n, features, generator=g))) @ truth + .3


def source(recipe, x):
    return pair_up(x, x.flip(-1) ** 2) if "transcoder" in recipe.model else Activations.from_tensor(x)


@pytest.mark.parametrize("name", list(RECIPES))
def test_trains_and_folds(name, tmp_path):
    x = toy()
    r = get_recipe(name, l0=3., batch_size=128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = Trainer(source(r, x), r, 32, 6400, seed=1)
        batches = iter(t.loader)
        for _ in range(t.steps): t.step(next(batches))
    assert all(p.isfinite().all() for p in t.sae.parameters())
    raw = x[:2048]
    folded = t.sae.fold(calibrate=raw if t.sae.gate.batch_dependent else None)
    assert folded.gate.name == ("jumprelu" if name not in ("topk", "topk_auxk", "multi_topk", "topk_2024", "abs_topk") else t.sae.gate.name)
    with torch.no_grad(): ours = codes_of(t.sae, raw / t.sae.scale, "table")
    theirs = folded.encode(raw)
    on, also = ours.f != 0, theirs != 0
    if t.sae.gate.batch_dependent:
        assert also.sum() / len(raw) == pytest.approx(on.sum().item() / len(raw), rel=.05)          # the same L0, if not the same entries
    else:
        close = (ours.z.detach() * t.sae.scale - 0).abs() < 1e-4                                     # rounding may move an entry on the edge
        assert ((on == also) | close).float().mean() > .9999
        torch.testing.assert_close(folded(raw) / t.sae.scale, ours.u_hat, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["practical", "batch_topk", "gated", "abs_topk", "feature_choice", "tied_relu", "matryoshka", "ri_l1"])
def test_saved_and_loaded(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = train(toy(), recipe=name, l0=3., batch_size=128, d_sae=32, tokens=6400, progress=False, out=tmp_path / "run")
    again = SAE.load(tmp_path / "run")
    x = toy(200, seed=3)
    torch.testing.assert_close(again(x), run.sae(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["p_anneal", "gated", "feature_choice", "batch_topk", "topk_auxk", "gemma_scope_2"])
def test_resumes_exactly(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r, acts = get_recipe(name, l0=3., batch_size=128), Activations.from_tensor(toy())
        whole, part = Trainer(acts, r, 32, 5120, 0), Trainer(acts, r, 32, 5120, 0)
        it = iter(whole.loader)
        for _ in range(whole.steps): whole.step(next(it))
        it = iter(part.loader)
        for _ in range(17): part.step(next(it))
        on = Trainer(acts, r, 32, 5120, 0)
        on.load_state_dict(part.state_dict())
        it = iter(on.loader)
        for _ in range(on.steps - 17): on.step(next(it))
    for a, b in zip(whole.sae.state_dict().values(), on.sae.state_dict().values()): assert torch.equal(a, b)


@pytest.mark.parametrize("fields, says", [
    (dict(l0=99.), "more than the 32 latents"), (dict(prefixes=(.5, .25, 1.)), "growing shares"), (dict(relative_bandwidth=None, bandwidth=0.), "bandwidth must be positive"),
    (dict(gate="relu"), "acts on thresholds"), (dict(gate="topk"), "acts on thresholds"), (dict(lr=-1.), "must be positive"), (dict(lrr=1.), "did you mean 'lr'"), (dict(quotas="zipff"), "unknown quotas"),
    (dict(auxiliary=("auxkk",)), "unknown auxiliary"), (dict(gate="gated"), "acts on thresholds"), (dict(model="tied"), "tied SAE"), (dict(coefficient=0.), "coefficient must be positive"),
])
def test_refuses(fields, says):
    with pytest.raises(ValueError, match=says): Trainer(Activations.from_tensor(toy(600)), get_recipe(**fields), 32, 1000)


def test_every_stated_value_is_in_the_printed_form():
    for r in RECIPES.values():
        text, html = str(r), r._repr_html_()
        for k in r.to_dict():
            if k not in ("name", "source", "stated"): assert k in text and k in html
        if r.stated: assert r.source and all(f"<td>{r.source}</td>" in html for _ in r.stated)


def test_learning_rate_rule():
    assert learning_rate(get_recipe(), 128, 1024, 4_000_000) == pytest.approx(.1 / math.sqrt(128))
    assert learning_rate(get_recipe(), 128, 1024, 1000) == pytest.approx(.25 / math.sqrt(128))
    assert learning_rate(get_recipe(batch_size=1024), 128, 1024, 4_000_000) == pytest.approx(.05 / math.sqrt(128))


def test_but_keeps_tuples_and_drops_the_source_of_changed_values():
    r = get_recipe("gemma_scope", betas=[.9, .99])
    assert r.betas == (.9, .99) and "betas" not in r.stated and "lr" in r.stated
    assert Recipe(**r.to_dict()) == r


def test_feature_choice_follows_a_budget_that_rises():
    "Quotas are cached; the budget k rises during training and the quotas with it."
    from jumprelu_nb.sae.gates import make_gate
    gate, z = make_gate("feature_choice", 32, k=2.), torch.randn(512, 32, generator=torch.Generator().manual_seed(0)) + 3
    first = int(gate.select(z).sum())
    gate.project_(); gate.k = 4.
    assert abs(int(gate.select(z).sum()) - 2 * first) <= 2
