"The step and JumpReLU against their definition, over shapes, dtypes and modes."
import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st

from jumprelu_nb.sae.ste import KERNELS, Kernel, gaussian_grad, gaussian_ste_grad, heaviside, jumprelu, optimal_bandwidth

names = list(KERNELS)


def dense(z, theta, eps, kernel, grad, function, ste_to_input=False):
    "The definition, term by term, in float64: output, gradient to z, gradient to theta."
    z, theta, grad = z.detach().double(), theta.detach().double(), grad.double()
    eps = eps.double() if isinstance(eps, torch.Tensor) else eps
    on, window = (z > theta).double(), KERNELS[kernel]((z - theta)/eps)/eps
    height = theta if function is jumprelu else torch.ones_like(theta)
    out = z*on if function is jumprelu else on
    dz = grad*((on if function is jumprelu else 0) + (height*window if ste_to_input else 0))
    dtheta = -(grad*height*window).reshape(-1, *theta.shape).sum(0) if theta.ndim else -(grad*height*window).sum()
    return out, dz, dtheta


def grads(function, z, theta, eps, kernel, ste, grad):
    z, theta = z.clone().requires_grad_(), theta.clone().requires_grad_()
    out = function(z, theta, eps, kernel, ste)
    dz, dtheta = torch.autograd.grad(out, [z, theta], grad.to(out.dtype), allow_unused=True)
    return out.detach(), torch.zeros_like(z) if dz is None else dz, dtheta


@pytest.mark.parametrize("function", [heaviside, jumprelu])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7), (2, 0, 7)])
@pytest.mark.parametrize("ste", [False, True])
def test_shapes(function, shape, ste):
    g = torch.Generator().manual_seed(0)
    z, theta, grad = torch.randn(shape, generator=g), torch.rand(shape[-1], generator=g), torch.randn(shape, generator=g)
    got, want = grads(function, z, theta, .7, "triangle", ste, grad), dense(z, theta, .7, "triangle", grad, function, ste)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("theta_shape", [(), (1,), (7,), (5, 7)])
def test_shared_threshold(theta_shape):
    g = torch.Generator().manual_seed(1)
    z, grad, theta = torch.randn(4, 5, 7, generator=g), torch.randn(4, 5, 7, generator=g), torch.full(theta_shape, .3)
    full = grads(jumprelu, z, theta.expand(7) if theta.numel() == 1 else theta, .5, "rectangle", False, grad)[2]
    got = grads(jumprelu, z, theta, .5, "rectangle", False, grad)[2]
    assert got.shape == theta_shape
    torch.testing.assert_close(got.sum(), full.sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(names), st.floats(1e-3, 3.), st.floats(0., 2.), st.booleans(), st.sampled_from([heaviside, jumprelu]))
def test_equals_definition(seed, kernel, eps, theta, ste, function):
    g = torch.Generator().manual_seed(seed)
    z, grad = torch.randn(6, 4, generator=g, dtype=torch.double), torch.randn(6, 4, generator=g, dtype=torch.double)
    t = torch.full((4,), theta, dtype=torch.double)
    for a, b in zip(grads(function, z, t, eps, kernel, ste, grad), dense(z, t, eps, kernel, grad, function, ste)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("function", [heaviside, jumprelu])
@pytest.mark.parametrize("z_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("theta_dtype", [torch.float32, torch.float64])
def test_dtypes(function, z_dtype, theta_dtype):
    z, theta = torch.linspace(-1, 1, 256).to(z_dtype)[:, None].repeat(1, 3), torch.full((3,), .3, dtype=theta_dtype)
    out, dz, dtheta = grads(function, z, theta, .5, "gaussian", True, torch.ones(256, 3))
    want = dense(z, theta, .5, "gaussian", torch.ones(256, 3), function, True)
    assert (out.dtype, dz.dtype, dtheta.dtype) == (z_dtype, z_dtype, theta_dtype)
    torch.testing.assert_close(dtheta.double(), want[2], rtol=1e-4, atol=1e-4)      # not rounded to the dtype of z


@pytest.mark.parametrize("function", [heaviside, jumprelu])
def test_bandwidth_tensor(function):
    z, theta, grad = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.full((3,), .2), torch.ones(9, 3)
    a = grads(function, z, theta, .6, "rectangle", True, grad)
    for eps in (torch.tensor(.6), torch.full((3,), .6)):
        for x, y in zip(a, grads(function, z, theta, eps, "rectangle", True, grad)): torch.testing.assert_close(x, y)
    mixed = grads(function, z, theta, torch.tensor([.6, .3, .6]), "rectangle", False, grad)[2]
    assert torch.equal(mixed[[0, 2]], a[2][[0, 2]]) and mixed[1] == grads(function, z, theta, .3, "rectangle", False, grad)[2][1]


@pytest.mark.parametrize("function", [heaviside, jumprelu])
def test_who_needs_grad(function):
    z, theta = torch.randn(4, 3), torch.full((3,), .2)
    assert not function(z, theta).requires_grad
    with torch.no_grad(): assert not function(z, theta.clone().requires_grad_()).requires_grad
    t = theta.clone().requires_grad_()
    function(z, t, 1.).sum().backward()
    assert t.grad.shape == (3,)
    for ste in (False, True):
        zz = z.clone().requires_grad_()
        function(zz, theta, 1., ste_to_input=ste).sum().backward()
        expect = dense(z, theta, 1., "rectangle", torch.ones(4, 3), function, ste)[1].float()
        torch.testing.assert_close(torch.zeros_like(z) if zz.grad is None else zz.grad, expect)


def test_autocast():
    g = torch.Generator().manual_seed(0)
    W, x, theta = torch.randn(16, 5, generator=g, requires_grad=True), torch.randn(64, 16, generator=g), torch.full((5,), .5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = x @ W
        f, h = jumprelu(z, theta, 2.), heaviside(z, theta, 2.)
        loss = f.float().square().sum() + h.sum(dtype=torch.float32)
    assert z.dtype == f.dtype == h.dtype == torch.bfloat16
    loss.backward()
    zz, t = (x @ W.detach()).requires_grad_(), theta.detach().clone().requires_grad_()
    (jumprelu(zz, t, 2.).square().sum() + heaviside(zz, t, 2.).sum()).backward()
    assert theta.grad.dtype == torch.float32 and W.grad.dtype == torch.float32
    assert (theta.grad - t.grad).norm() < .05*t.grad.norm()


def test_strict_and_edge_values():
    theta = torch.tensor([.5, .5, .5, .5, 0.])
    z = torch.tensor([.5, math.inf, -math.inf, math.nan, -0.])
    f = jumprelu(z, theta)
    assert f[0] == 0 and f[1] == math.inf and f[2] == 0 and f[3].isnan() and f[4] == 0       # on only strictly above; NaN is not hidden
    assert heaviside(z, theta)[:3].tolist() == [0, 1, 0]
    t = torch.tensor([.5], requires_grad=True)
    heaviside(torch.tensor([[.25], [.75]]), t, .5).sum().backward()                           # window open at both ends
    assert t.grad.item() == 0


def test_second_derivative_is_refused():
    z = torch.randn(4, 3, requires_grad=True)
    theta = torch.full((3,), .2, requires_grad=True)
    d, = torch.autograd.grad(jumprelu(z, theta, 1.).square().sum(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): d.sum().backward()


def test_compiles_whole():
    def loss(z, t, e): return jumprelu(z, t, e).square().sum() + heaviside(z, t, e).sum()
    z, t = torch.randn(8, 3, requires_grad=True), torch.full((3,), .3, requires_grad=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(loss(z, t, .5), [z, t]), torch.autograd.grad(compiled(z, t, .5), [z, t])): assert torch.equal(a, b)


def test_kernels_can_travel():
    for k in KERNELS.values():
        assert pickle.loads(pickle.dumps(k)) == k == copy.deepcopy(k)
        assert abs(k.like_rectangle(.3)**2*k.variance - .09/12) < 1e-12
    own = Kernel("wide", lambda u: KERNELS["rectangle"](u/2)/2, 1., 1/3, 1/4, 1/2)
    z, t = torch.tensor([[.2]]), torch.tensor([.1], requires_grad=True)
    assert torch.autograd.grad(heaviside(z, t, .15, own).sum(), t)[0].item() == pytest.approx(-1/.3, rel=1e-5)


@pytest.mark.parametrize("bad, words", [
    (dict(kernel="box"), "unknown kernel 'box'"), (dict(bandwidth=0), "must be positive"), (dict(bandwidth=-1.), "must be positive"),
    (dict(bandwidth=math.nan), "must be positive"), (dict(threshold=torch.ones(4)), r"\(4,\) does not fit"), (dict(threshold=torch.ones(2, 3)), "does not fit")])
@pytest.mark.parametrize("function", [heaviside, jumprelu])
def test_errors(function, bad, words):
    with pytest.raises(ValueError, match=words): function(**(dict(z=torch.ones(3), threshold=torch.ones(3)) | bad))


def test_closed_forms():
    t = torch.linspace(.1, 2, 40, dtype=torch.double)
    p = torch.distributions.Normal(0., 1.)
    def expected(t, lam): return p.cdf(t) - t*p.log_prob(t).exp() + lam*(1 - p.cdf(t))
    for lam in (.1, 1.):
        torch.testing.assert_close((expected(t + 1e-4, lam) - expected(t - 1e-4, lam))/2e-4, gaussian_grad(t, lam), atol=1e-7, rtol=1e-6)
        for eps in (.05, .5):                                                                 # quadrature of the two halves of the window
            s = (torch.arange(20_000, dtype=torch.double) + .5)/20_000 - .5
            z = t[:, None] + eps*s
            want = ((torch.where(s < 0, 2*t[:, None]*z, 0.) - lam)*p.log_prob(z).exp()).mean(1)
            torch.testing.assert_close(gaussian_ste_grad(t, lam, eps), want, atol=1e-8, rtol=1e-6)
    assert gaussian_grad(.5, .25) == 0 and gaussian_ste_grad(.5, .25, .1).dtype == torch.float64


def test_optimal_bandwidth():
    base = optimal_bandwidth(.5, .25, 4096)
    phi = math.exp(-.125)/math.sqrt(2*math.pi)
    torch.testing.assert_close(optimal_bandwidth(.5, .25, 4096, p=phi, dp=-.5*phi), base)
    s = 3.                                                                                    # z scaled by s: θ by s, λ by s², ε* by s
    torch.testing.assert_close(optimal_bandwidth(.5*s, .25*s*s, 4096, p=phi/s, dp=-.5*phi/s/s), base*s)
    gauss, rect = KERNELS["gaussian"], KERNELS["rectangle"]
    torch.testing.assert_close(optimal_bandwidth(.5, .25, 4096, "gaussian")/base,
                               torch.tensor((gauss.roughness/gauss.m1**2/(rect.roughness/rect.m1**2))**(1/3), dtype=torch.double))
    with pytest.raises(ValueError, match="unknown kernel"): optimal_bandwidth(.5, .25, 4096, "box")
