"Pairs of activations under hostile input and on every family of architecture, and stand-ins for layers."
import copy

import numpy as np
import pytest
import torch
from jumprelu_nb.data.activations import Activations, keep_mask
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.data.pairs import Pairs, pair_up, pairs, splice_pair
from jumprelu_nb.sae.transcoder import Transcoder
from test_lm import every, hooks_left, make_lm


@pytest.fixture(scope="module", params=every)
def arch(request): return make_lm(request.param)


@pytest.fixture(scope="module")
def lm(): return LanguageModel.load("embedded", device="cpu")


@pytest.fixture(scope="module")
def tokens(lm): return torch.randint(1, lm.vocab_size, (24, 32), generator=torch.Generator().manual_seed(0))


def test_pairs_equal_two_sources_to_the_bit(lm, tokens):
    both = next(pairs(lm, "mlp_in.1", "mlp_out.1", tokens, batch_contexts=5).rows("one order"))
    apart = [next(Activations.from_lm(lm, s, tokens, batch_contexts=5).rows("one order")) for s in ("mlp_in.1", "mlp_out.1")]
    assert torch.equal(both, torch.cat(apart, 1))


def test_any_two_sites(lm, tokens):
    "not only an MLP: a whole block, several blocks, different widths"
    for a, b in (("resid_pre.1", "resid_post.1"), ("resid_post.0", "resid_post.3"), ("attn_out.2", "resid_post.2")):
        p = pairs(lm, a, b, tokens)
        assert (p.split, p.d_out) == (lm.site(a).d_in, lm.site(b).d_in)
        assert p.sample(50).shape == (50, p.split + p.d_out)


def test_resume_in_the_middle_of_a_later_epoch(lm, tokens):
    p = pairs(lm, "mlp_in.2", "mlp_out.2", tokens)
    one, two = (p.loader(100, seed=1, buffer_tokens=300) for _ in range(2))
    for _ in range(2*p.n_rows//100 + 1): next(one)
    two.load_state_dict(one.state_dict())
    assert torch.equal(next(one), next(two))


def test_the_mark_tells_splits_and_sites_apart(lm, tokens):
    x = torch.randn(10, 4)
    source = Activations.from_tensor(x)
    marks = {Pairs(source, 1).mark, Pairs(source, 2).mark, source.mark} | {pairs(lm, a, b, tokens).mark for a, b in (("mlp_in.1", "mlp_out.1"), ("mlp_in.1", "mlp_out.2"), ("mlp_in.2", "mlp_out.2"))}
    assert len(marks) == 6


def test_streamed_text(lm):
    docs = [f"def f{i}(x): return x + {i}\n"*20 for i in range(40)]
    class Endless:                                             # any iterable of dictionaries is a dataset
        def __iter__(self): return ({"text": d} for d in docs)
    p = pairs(lm, "mlp_in.2", "mlp_out.2", Endless(), split=None)
    assert p.n_rows is None and p.split == 128 and next(p.loader(64, buffer_tokens=128)).shape == (64, 256)


@pytest.mark.parametrize("split", [0, -1, 4, 5])
def test_impossible_splits(split):
    with pytest.raises(ValueError, match="cannot be split after"): Pairs(Activations.from_tensor(torch.randn(3, 4)), split)


def test_matrices_of_other_make(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(300, 3)), np.random.default_rng(1).integers(-9, 9, (300, 2))
    np.save(tmp_path/"x.npy", x)
    p = pair_up(np.load(tmp_path/"x.npy", mmap_mode="r"), torch.as_tensor(y).half())
    a, b = p.cut(p.sample(300))
    assert a.dtype == b.dtype == torch.float32
    order = [int(np.abs(x - r).sum(1).argmin()) for r in a.double().numpy()]
    assert sorted(order) == list(range(300)) and np.array_equal(b.numpy(), y[order])


@pytest.mark.parametrize("x, y, error, match", [
    (torch.randn(3, 2), torch.randn(4, 2), ValueError, "no pairs"), (torch.randn(3, 2), torch.randn(3), ValueError, "y of the pairs must have the shape"),
    (torch.zeros(0, 2), torch.zeros(0, 2), ValueError, "no rows"), (torch.randn(3, 2), torch.randn(3, 2) > 0, TypeError, "y of the pairs must hold real numbers"),
    (torch.randn(3, 2), "abc", TypeError, "y of the pairs")])
def test_bad_matrices(x, y, error, match):
    with pytest.raises(error, match=match): pair_up(x, y)


def test_nan_in_the_target_is_named():
    y = torch.randn(500, 2); y[123, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of 400 activations|1 of 500 activations"):
        loader = pair_up(torch.randn(500, 3), y).loader(100)
        for _ in range(9): next(loader)


def test_every_architecture(arch):
    "the pair is what the sites hold, and a copy of what lies between them is a perfect stand-in"
    lm = arch
    tokens = torch.randint(2, 64, (3, 12), generator=torch.Generator().manual_seed(0)); tokens[:, 0] = 0
    a, b = lm.site("mlp_in.1"), lm.site("mlp_out.1")
    p = pairs(lm, a, b, tokens, split=None)
    seen = lm.capture(tokens, [a, b])
    keep = keep_mask(lm, tokens)
    x, y = p.cut(p.sample(p.n_rows))
    assert torch.allclose(x.sum(0), seen[a.name][keep].sum(0), atol=1e-3) and torch.allclose(y.sum(0), seen[b.name][keep].sum(0), atol=1e-3)
    table = {tuple(u.tolist()): v for u, v in zip(seen[a.name].flatten(0, 1), seen[b.name].flatten(0, 1))}
    look_up = lambda x: torch.stack([table[tuple(u.tolist())] for u in x.flatten(0, 1)]).view(*x.shape[:2], -1)
    clean = lm.logits(tokens)
    with splice_pair(lm, look_up, a, b): assert torch.allclose(lm.logits(tokens), clean, atol=1e-4)
    assert hooks_left(lm) == 0


def test_without_bos_the_first_position_is_spared():
    lm = make_lm("gpt2", bos=False)
    tokens = torch.randint(2, 64, (2, 8))
    with splice_pair(lm, lambda x: 0*x, "mlp_in.1", "mlp_out.1"): y = lm.capture(tokens, "mlp_out.1")["mlp_out.1"]
    assert (y[:, 0] != 0).any() and (y[:, 1:] == 0).all()


def test_stand_ins_stack_and_leave_nothing_behind(lm, tokens):
    clean = lm.logits(tokens[:2])
    copies = {i: copy.deepcopy(lm.model.get_submodule(lm.site(f"mlp_in.{i}").module)) for i in (1, 2)}
    with splice_pair(lm, copies[1], "mlp_in.1", "mlp_out.1"), splice_pair(lm, copies[2], "mlp_in.2", "mlp_out.2"):
        assert torch.allclose(lm.logits(tokens[:2]), clean, atol=1e-3)
    def broken(x): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), splice_pair(lm, broken, "mlp_in.1", "mlp_out.1"): lm.logits(tokens[:2])
    assert torch.equal(lm.logits(tokens[:2]), clean)


def test_generation_with_a_stand_in(lm):
    "one token at a time, from the cache"
    mlp = copy.deepcopy(lm.model.get_submodule(lm.site("mlp_in.2").module))
    with splice_pair(lm, mlp, "mlp_in.2", "mlp_out.2"): assert lm.generate("import ", 12, temperature=0) == lm.generate("import ", 12, temperature=0)


def test_half_precision(lm, tokens):
    tc = Transcoder(128, 32, "relu", metadata=dict(site="mlp_in.2", site_out="mlp_out.2")).init_(0).to(torch.bfloat16)
    with splice_pair(lm, tc): assert lm.logits(tokens[:1]).isfinite().all()
