"Quotas against their formula, selection against sorting, thresholds, folding and files of the Choice gates."
import math
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from jumprelu_nb.sae.choice import FeatureChoiceGate, MutualChoiceGate, largest_per_latent, zipf_quotas
from jumprelu_nb.sae.gates import GATES, make_gate
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.objectives import Objective, update_
from jumprelu_nb.sae.sparse import codes_of
from jumprelu_nb.sae.topk import BatchTopKGate
from test_topk import Elsewhere, kinds, table

few = settings(max_examples=80, deadline=None)


def by_sorting(z, quota):
    order = z.nan_to_num(math.inf, math.inf, -math.inf).sort(dim=0, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(z))[:, None].expand_as(order))
    return (place < quota) & ~(z <= 0)


@few
@given(st.integers(0, 999), st.integers(0, 30), st.integers(1, 30), kinds, st.booleans())
def test_selection_is_that_of_a_sort(seed, rows, cols, kind, guessed):
    z, g = table(seed, rows, cols, kind), torch.Generator().manual_seed(seed)
    quota = torch.randint(0, rows + 1, (cols,), generator=g)
    guess = 2*torch.rand(cols, generator=g) - .5 if guessed else None
    mask, low = largest_per_latent(z, quota, guess)
    assert mask.equal(by_sorting(z, quota))
    for i in range(cols):
        kept = z[mask[:, i], i].nan_to_num(math.inf, math.inf)
        assert low[i].item() == (kept.min().item() if len(kept) and kept.min() < math.inf else 0.)


def test_the_path_for_accelerators_agrees():
    g = torch.Generator().manual_seed(0)
    for kind in ("normal", "negative", "ties", "equal"):
        z, quota = table(5, 20, 30, kind), torch.randint(0, 21, (30,), generator=g)
        for a, b in zip(largest_per_latent(z.as_subclass(Elsewhere), quota), largest_per_latent(z, quota)): assert a.as_subclass(torch.Tensor).equal(b)


@few
@given(st.integers(1, 400), st.integers(1, 600), st.floats(0, 1), st.floats(0, 60))
def test_quotas_add_up(d_sae, batch, share, exponent):
    total = round(share*d_sae*batch)
    m = zipf_quotas(d_sae, total, batch, exponent)
    assert m.sum() == total and m.min() >= (total >= d_sae) and m.max() <= batch and (m.diff() <= 0).all()


def test_quotas_are_the_rounded_formula_where_nothing_is_clamped():
    for d_sae, total, batch, s in ((256, 2048, 512, 1.), (64, 10_000, 5000, .5), (1000, 50_000, 50_000, 1.)):
        share = total*(w := torch.arange(1, d_sae + 1).double()**-s)/w.sum()
        assert share.max() < batch and share.min() > 1
        assert (zipf_quotas(d_sae, total, batch, s) - share).abs().max() <= 1


@pytest.mark.parametrize("affinity", ["density", "sum"])
def test_the_definition_written_out(affinity):
    "Ranks, quotas and columns by hand, in the way of a specification"
    z = torch.randn(60, 20, generator=torch.Generator().manual_seed(0)) + torch.linspace(-.5, .5, 20)
    top = z.flatten().topk(180).indices
    key = [((top % 20 == i).sum().item() if affinity == "density" else 0, z[:, i].sum().item()) for i in range(20)]
    quota = zipf_quotas(20, 180, 60)
    want = torch.zeros_like(z)
    for rank, i in enumerate(sorted(range(20), key=lambda i: key[i], reverse=True)):
        at = z[:, i].topk(int(quota[rank])).indices
        want[at, i] = z[at, i].relu()
    assert FeatureChoiceGate(20, 3, affinity=affinity)(z).equal(want)


def test_no_latent_is_left_out_that_has_anything_to_say():
    z = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)) - torch.linspace(0, 2, 40)
    gate = FeatureChoiceGate(40, 4)
    assert (gate(z) != 0).any(0).equal((z > 0).any(0))
    assert not (MutualChoiceGate(40, 4)(z) != 0).any(0).all()


def test_mutual_choice_is_batch_topk():
    z = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    a, b = MutualChoiceGate(20, 2.7), BatchTopKGate(20, 2.7)
    assert a(z).equal(b(z)) and a.running.equal(b.running) and issubclass(MutualChoiceGate, BatchTopKGate)
    assert a.eval()(z).equal(b.eval()(z))


@pytest.mark.parametrize("form", ["auto", "list", "table"])
def test_one_step_moves_the_averages_once(form):
    g, sae = torch.Generator().manual_seed(0), SAE(8, 32, FeatureChoiceGate(32, 12, momentum=.5)).init_(0)
    opt, expected = torch.optim.SGD(sae.parameters(), lr=.01), torch.zeros(32)
    for _ in range(6):
        u = torch.randn(48, 8, generator=g)/8**.5
        with torch.no_grad(): low = FeatureChoiceGate(32, 12).choose(sae.pre_acts(u))[1]
        expected = torch.where(low > 0, torch.where(expected > 0, (expected + low)/2, low), expected)
        update_(sae, Objective(), opt, codes_of(sae, u, form), 0.)
        torch.testing.assert_close(sae.gate.running, expected, atol=1e-4, rtol=1e-3)


def test_a_latent_that_never_passed_is_silent_and_its_threshold_finite():
    gate = FeatureChoiceGate(3, 1)
    gate(torch.tensor([[.5, 1., -1.], [.2, .8, -2.], [.3, .2, -.1]]))
    theta = gate.inference_threshold()
    assert theta[2] == theta.max() and theta.isfinite().all() and gate.running[2] == 0


@pytest.mark.parametrize("calibrate", [False, True])
def test_fold_and_files(tmp_path, calibrate):
    sae = SAE(6, 20, FeatureChoiceGate(20, 3), scale=4., pre_encoder_bias=True).init_(0)
    x = 4*torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    wanted = (sae.encode(x) != 0).sum(1).float().mean()                  # below k: a quota that exceeds the positive tokens of a latent goes to nobody
    before = sae.gate.running.clone()
    folded = sae.fold(x if calibrate else None)
    assert sae.gate.running.equal(before) and folded.gate.name == "jumprelu"
    l0 = (folded.encode(x) != 0).sum(1).float().mean()
    assert abs(l0/wanted - 1) < .02
    if not calibrate: torch.testing.assert_close(folded(x), sae.eval()(x).detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(SAE.load(folded.save(tmp_path/"sae"))(x), folded(x))


def test_checkpoint_and_config():
    gate = FeatureChoiceGate(20, 3, quotas="uniform", exponent=.4, affinity="sum", momentum=.5)
    z = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    gate(z)
    again = make_gate(gate.config(), 20); again.load_state_dict(gate.state_dict())
    assert again.config() == gate.config()
    for g in (gate, again): g(2*z)
    assert gate.running.equal(again.running) and gate.running.shape == (20,)


def test_small_batches_warn_only_where_it_matters():
    gate = FeatureChoiceGate(40, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gate(torch.randn(10, 40))                                         # 40 entries for 40 latents
        with torch.no_grad(): gate(torch.randn(3, 40))                    # a look, as the last part of a calibration sample
    with pytest.warns(UserWarning, match="take batches of 10 tokens or more"): gate(torch.randn(9, 40))
    with torch.no_grad(): assert gate(torch.randn(0, 40)).shape == (0, 40)


def test_leading_dimensions():
    z = torch.randn(4, 15, 20, generator=torch.Generator().manual_seed(0))
    assert FeatureChoiceGate(20, 3)(z).equal(FeatureChoiceGate(20, 3)(z.view(60, 20)).view(4, 15, 20))


def test_names_and_refusals():
    assert {"mutual_choice", "feature_choice"} <= set(GATES)
    assert GATES["feature_choice"].calibration == "latent" and GATES["feature_choice"].batch_dependent and GATES["mutual_choice"].batch_dependent
    for s in (-1., math.nan, math.inf):
        with pytest.raises(ValueError, match="exponent"): FeatureChoiceGate(10, 2, exponent=s)
    for bad in (dict(quotas="fair"), dict(affinity="love"), dict(momentum=1.), dict(k=0), dict(k=11)):
        with pytest.raises(ValueError): FeatureChoiceGate(10, **{"k": 2, **bad})
    with pytest.raises(ValueError, match="does not fit"): zipf_quotas(3, 10, 3)
