"Budgets per token and per batch: selections against sorting, thresholds against hand-made averages, folding, files."
import copy
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from jumprelu_nb.sae.gates import GATES, make_gate
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.objectives import Objective, update_
from jumprelu_nb.sae.sparse import codes_of
from jumprelu_nb.sae.topk import AbsTopKGate, BatchTopKGate, largest, nth_largest

few = settings(max_examples=80, deadline=None)


def table(seed, rows, cols, kind):
    z = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return {"normal": z, "ties": z.round(), "equal": torch.ones_like(z), "negative": -z.abs(), "zero": torch.zeros_like(z), "nan": torch.where(z > 1, math.nan, z),
            "inf": torch.where(z > .5, math.inf, z), "-inf": torch.where(z < .5, -math.inf, z), "tiny": z*1e-40, "huge": z*1e38}[kind]


kinds = st.sampled_from(["normal", "ties", "equal", "negative", "zero", "nan", "inf", "-inf", "tiny", "huge"])


@few
@given(st.integers(0, 999), st.integers(1, 30), st.integers(1, 30), kinds, st.floats(0, 1), st.sampled_from([-math.inf, -1., 0., .3, 1., math.inf]))
def test_nth_and_largest_are_those_of_a_full_sort(seed, rows, cols, kind, share, guess):
    z = table(seed, rows, cols, kind)
    n = round(share*z.numel())
    clean = z.flatten().nan_to_num(math.inf, math.inf, -math.inf)
    ranked = clean.sort(descending=True, stable=True)
    mask, low = largest(z, n, guess)
    want = torch.zeros(z.numel(), dtype=torch.bool).index_fill(0, ranked.indices[:n], True).view(z.shape) & ~(z <= 0)
    assert mask.equal(want)
    assert low.item() == (clean[want.flatten()].min().item() if want.any() else 0.)
    if n: assert nth_largest(z, n, guess).item() == ranked.values[n - 1].item()


@few
@given(st.integers(0, 99), st.integers(1, 12), st.integers(1, 12), st.integers(1, 40), st.floats(.01, 1))
def test_budget_is_spent_exactly_over_all_leading_dimensions(seed, a, b, d_sae, share):
    k = max(.001, share*d_sae)
    z = torch.rand(a, b, d_sae, generator=torch.Generator().manual_seed(seed)) + .1
    n = (BatchTopKGate(d_sae, k)(z) != 0).sum().item()
    assert n == math.floor(round(k*a*b, 6))


class Elsewhere(torch.Tensor):
    "Says that it is not on the CPU, so that the path for accelerators, which is plain torch, runs here too."
    device = torch.device("meta")


def test_the_path_for_accelerators_agrees():
    "Up to ties, which it breaks as it likes; the count is exact there too"
    for kind in ("normal", "negative", "nan", "inf", "equal"):
        z = table(3, 20, 30, kind)
        for n in (1, 7, 300, 600):
            far = z.as_subclass(Elsewhere)
            assert nth_largest(far, n).item() == nth_largest(z, n).item()
            (mask, low), (want, want_low) = largest(far, n), largest(z, n)
            assert mask.sum().item() == want.sum().item() and low.item() == (want_low.item() if want_low < math.inf else 0)
            if kind == "normal": assert mask.as_subclass(torch.Tensor).equal(want)


def test_nan_is_seen():
    "A broken training shows in the loss, in either form"
    z = torch.randn(10, 20); z[3, 4] = math.nan
    gate = BatchTopKGate(20, 2)
    assert gate(z).isnan().sum() == 1 and gate.select(z)[3, 4]
    assert gate.running.isfinite().all()


def test_gradients_reach_what_passed_and_nothing_else():
    for gate in (BatchTopKGate(20, 2.5), AbsTopKGate(20, 2)):
        z = torch.randn(10, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
        f = gate(z); f.sum().backward()
        assert z.grad.equal((f != 0).float())
    z = (torch.randn(10, 20) - 20).requires_grad_()                       # algorithms, bug 12
    BatchTopKGate(20, 3)(z).sum().backward()
    assert (z.grad == 0).all()


def test_double_precision_gradcheck():
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    for gate in (BatchTopKGate(8, 2.4), AbsTopKGate(8, 3)): assert torch.autograd.gradcheck(lambda x, gate=gate: gate(x), z)


@pytest.mark.parametrize("form", ["auto", "list", "table"])
def test_one_step_moves_the_average_once(form):
    g = torch.Generator().manual_seed(0)
    sae = SAE(8, 32, BatchTopKGate(32, 12, momentum=.5)).init_(0)
    opt, expected = torch.optim.SGD(sae.parameters(), lr=.01), None
    for _ in range(6):
        u = torch.randn(48, 8, generator=g)/8**.5
        with torch.no_grad(): tau = largest(sae.pre_acts(u), 12*48)[1].item()
        expected = tau if expected is None else .5*expected + .5*tau
        update_(sae, Objective(), opt, codes_of(sae, u, form), 0.)
        assert sae.gate.running.item() == pytest.approx(expected, rel=1e-5)


def test_switching_forms_misses_no_batch():
    "A list step, then a table step on other data, without a step of the optimizer between them"
    sae = SAE(8, 32, BatchTopKGate(32, 2, momentum=.5)).init_(0)
    a, b = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0))
    taus = [largest(sae.pre_acts(u), 128)[1].item() for u in (a, 2*b)]
    codes_of(sae, a, "list"); codes_of(sae, 2*b, "table")
    assert sae.gate.running.item() == pytest.approx(sum(taus)/2, rel=1e-5)


def test_calibration_and_looking_leave_the_threshold_alone():
    sae = SAE(8, 32, BatchTopKGate(32, 2)).init_(0)
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="calibrate"): sae.fold()
    sae.fold(calibrate=x)
    assert sae.gate.inference_threshold() is None and sae.gate.training
    sae.gate(sae.pre_acts(x)); before = sae.gate.running.clone()
    calibrated = sae.fold(calibrate=5*x)
    assert sae.gate.running.equal(before) and calibrated.threshold[0] > 2*before.item()


@pytest.mark.parametrize("C, pre, norm", [(1., False, "unit"), (7., True, "free")])
def test_fold_and_files(tmp_path, C, pre, norm):
    g = torch.Generator().manual_seed(0)
    sae = SAE(6, 20, BatchTopKGate(20, 3), scale=C, pre_encoder_bias=pre, decoder_norm=norm).init_(0)
    with torch.no_grad():
        sae.b_dec.copy_(.3*torch.randn(6, generator=g))
        if norm == "free": sae.W_dec.mul_(.2 + torch.rand(20, 1, generator=g))
    x = C*torch.randn(400, 6, generator=g)
    sae(x); sae.eval()
    torch.testing.assert_close(sae.fold()(x)/C, sae(x).detach()/C, atol=1e-5, rtol=1e-4)
    loaded = SAE.load(sae.save(tmp_path/"sae"))
    assert loaded.gate.name == "jumprelu"
    torch.testing.assert_close(loaded(x)/C, sae(x).detach()/C, atol=1e-5, rtol=1e-4)


def test_state_survives_a_checkpoint_and_other_dtypes():
    gate = BatchTopKGate(10, 2)
    z = torch.randn(30, 10, generator=torch.Generator().manual_seed(0))
    gate(z); gate(2*z)
    again = make_gate(gate.config(), 10); again.load_state_dict(gate.state_dict())
    other = copy.deepcopy(gate)
    for g in (gate, again, other): g(1.5*z)
    assert gate.running.equal(again.running) and gate.running.equal(other.running)
    assert gate.to(torch.bfloat16).running.dtype == torch.float32
    assert gate(z.bfloat16()).dtype == torch.bfloat16 and gate.eval()(z.bfloat16()).dtype == torch.bfloat16


def test_eval_mode_is_what_fold_says_in_bfloat16():
    sae = SAE(6, 20, BatchTopKGate(20, 3)).init_(0); x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    sae(x); sae = sae.to(torch.bfloat16).eval()
    assert (sae.encode(x.bfloat16()) != 0).equal(sae.fold().encode(x.bfloat16()) != 0)


def test_abs_topk_keeps_signs_and_survives_folding():
    sae = SAE(6, 20, AbsTopKGate(20, 3), scale=3.).init_(0)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert (sae.encode(x) < 0).any() and (sae.encode(x) != 0).sum(1).eq(3).all()
    folded = sae.fold()
    torch.testing.assert_close(folded(x), sae(x).detach())
    assert folded.threshold is None
    z = torch.zeros(4, 20, requires_grad=True)                            # nothing to choose between: k of them, all zero, in both forms
    assert AbsTopKGate(20, 3).select(z).sum(1).eq(3).all() and (AbsTopKGate(20, 3)(z) == 0).all()


def test_empty_and_tiny_batches():
    gate = BatchTopKGate(5, .3)
    assert gate(torch.ones(0, 5)).shape == (0, 5)
    assert (gate(torch.ones(1, 5)) == 0).all() and gate.inference_threshold() is None      # ⌊0.3⌋ = 0
    assert (gate(torch.ones(4, 5)) != 0).sum() == 1


def test_names():
    assert {"abs_topk", "batch_topk"} <= set(GATES)
    for k in (0, -1, 6, math.nan, math.inf):
        with pytest.raises(ValueError, match="not between 0 and d_sae"): BatchTopKGate(5, k)
    for momentum in (-.1, 1., math.nan):
        with pytest.raises(ValueError, match="momentum"): BatchTopKGate(5, 2, momentum)
    with pytest.raises(ValueError, match="Gate 'batch_topk'"): make_gate("batch_topk", 5, kk=2)
