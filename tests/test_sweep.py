"evaluate/sweep: what protects the grid and teaches nobody."
from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from jumprelu_nb.data.activations import Activations
from jumprelu_nb.data.lm import LanguageModel
from jumprelu_nb.data.synthetic import preset
from jumprelu_nb.evaluate.frontier import Frontier
from jumprelu_nb.evaluate.metrics import reconstruction
from jumprelu_nb.evaluate.sweep import Splicer, lm_splits, sweep, train_together
from jumprelu_nb.train.recipes import RECIPES, get_recipe
from jumprelu_nb.train.trainer import train

truth = preset("toy")
x, held, other = truth.sample(3200, seed=0).x, truth.sample(500, seed=1).x, truth.sample(500, seed=2).x
small = dict(d_sae=30, tokens=3200, batch_size=16, validation=held, progress=False)


def timeless(f): return [{k: v for k, v in r.items() if k != "seconds"} for r in f.rows]


# ------------------------------------------------------------------------------------------------ one pass
short = [r.name for r in RECIPES.values() if r.source and not r.stated and "transcoder" not in r.model]


def test_every_short_recipe_trains_in_a_group_as_it_does_alone():
    "Bit-equal, whatever its gate, objective and auxiliaries; also with others between"
    few = dict(d_sae=30, tokens=320)
    recipes = [get_recipe(n, l0=3., batch_size=16) for n in short]
    for r, (sae, seconds) in zip(recipes, train_together(Activations.from_tensor(x), recipes, seed=3, **few)):
        alone = train(x, recipe=r, seed=3, progress=False, **few).sae
        assert seconds > 0 and sae.metadata["recipe"] == r.to_dict() and sae.metadata["seed"] == 3
        for (k, a), (_, b) in zip(sae.state_dict().items(), alone.state_dict().items()): assert torch.equal(a, b), (r.name, k)


def test_the_activations_are_not_changed():
    acts = Activations.from_tensor(x)
    train_together(acts, [get_recipe(l0=2., batch_size=16)], 30, 320)
    assert "sample" not in vars(acts)


def test_ticks_count_tokens_of_all():
    n = []
    train_together(Activations.from_tensor(x), [get_recipe(l0=2., batch_size=16)]*3, 30, 320, tick=n.append)
    assert sum(n) == 3*320


def test_a_one_pass_source_is_enough_for_one_group():
    blocks = Activations.from_blocks(iter(x.split(400)))
    (a, _), (b, _) = train_together(blocks, [get_recipe(n, l0=2., batch_size=16, calibrate=False) for n in ("practical", "relu_l1")], 30, 1600)
    assert a is not None and b is not None


# ------------------------------------------------------------------------------------------------ cells
def test_cells_are_independent_of_the_grid():
    "A cell alone, in a larger grid, with other group sizes, order of recipes and of L0s: the same numbers"
    whole = sweep(x, ["practical", "topk", "gated"], [2, 4], seeds=(0, 1), tuning=other, group=5, **small)
    alone = sweep(x, ["gated"], [4], seeds=[1], tuning=other, **small)
    turned = sweep(x, ["gated", "practical", "topk"], [4, 2], seeds=(1, 0), tuning=other, group=2, **small)
    at = lambda f: {(r["recipe"], r["l0"], r["seed"]): r for r in timeless(f)}
    assert at(alone).items() <= at(whole).items() and at(turned) == at(whole)


def test_recipes_of_different_batch_sizes():
    f = sweep(x, ["topk", get_recipe("topk", name="large")], [2], seeds=[0], **small | dict(batch_size=16))
    assert {r["recipe"] for r in f.rows} == {"topk", "large", "random"}
    mixed = sweep(x, [get_recipe("topk", batch_size=16), get_recipe("topk", name="large", batch_size=32)], [2], seeds=[0], d_sae=30, tokens=6400, validation=held, progress=False)
    a, b = mixed.only(recipe="topk").rows[0], mixed.only(recipe="large").rows[0]
    assert a["fvu"] != b["fvu"]


def test_arrays_memory_maps_and_tensors_give_the_same(tmp_path):
    np.save(tmp_path/"x.npy", x.numpy()); np.save(tmp_path/"v.npy", held.numpy())
    f = sweep(np.load(tmp_path/"x.npy", mmap_mode="r"), ["topk"], [2], seeds=[0], name="x", **small | dict(validation=np.load(tmp_path/"v.npy", mmap_mode="r")))
    g = sweep(x, ["topk"], [2], seeds=[0], name="x", **small)
    assert [r | dict(setup="") for r in timeless(f)] == [r | dict(setup="") for r in timeless(g)]


def test_multipliers_scale_the_recipes_own_rate():
    seen = []
    sweep(x, [get_recipe("topk", lr=.01), get_recipe("practical", lr=.02)], [2], seeds=[0], lrs={"topk": .5, "practical": 1.}, control=False, measure=lambda s: seen.append(s.metadata) or {}, **small)
    assert [m["recipe"]["lr"] for m in seen] == [.005, .02]


def test_measure_adds_columns():
    f = sweep(x, ["topk"], [2], seeds=[0], measure=lambda s: dict(longest=s.W_enc.norm(dim=0).max().item()), **small)
    assert all(r["longest"] > 0 for r in f.rows)


def test_a_diverged_cell_is_kept_as_such(tmp_path):
    go = lambda: sweep(x, ["topk", "practical"], [2], seeds=[0], lrs={"topk": 1e32, "practical": 1.}, out=tmp_path, control=False, **small)
    f = go()
    a, b = f.rows
    assert "diverged" in a["failed"] and "fvu" not in a and b["fvu"] < 1 and f.at(2)["topk"].missing == {0: a["failed"]}
    assert timeless(go()) == timeless(f) and "1 failed" in repr(f)


# ------------------------------------------------------------------------------------------------ folders
def test_killed_at_any_moment(tmp_path):
    "SIGKILL leaves whole lines, and the next call ends with the rows of an uninterrupted sweep"
    code = ("import torch; torch.set_num_threads(1)\nfrom jumprelu_nb.data.synthetic import preset\nfrom jumprelu_nb.evaluate.sweep import sweep\nt = preset('toy')\n"
            "if __name__ == '__main__': sweep(t.sample(3200, seed=0).x, ['practical', 'topk'], [2, 3, 4], seeds=(0, 1), d_sae=30, tokens=3200, batch_size=16, validation=t.sample(500, seed=1).x, progress=False, group=2, out=%r)")
    out = tmp_path/"grid"
    p = subprocess.Popen([sys.executable, "-c", code % str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    start = time.time()
    while not list(out.glob("*.jsonl")) and time.time() - start < 240 and p.poll() is None: time.sleep(.05)
    time.sleep(.3)
    if p.poll() is None: p.send_signal(signal.SIGKILL)
    p.wait()
    before = Frontier.load(out)
    assert 0 < len(before)
    args = (x, ["practical", "topk"], [2, 3, 4])
    measured = []
    after = sweep(*args, seeds=(0, 1), out=out, measure=lambda s: measured.append(s) or {}, **small)
    assert len(measured) == 18 - len(before) and len(after) == 18
    assert timeless(after) == timeless(sweep(*args, seeds=(0, 1), **small))


def test_the_configuration_is_plain_json_and_names_everything(tmp_path):
    sweep(x, ["topk"], [2], seeds=[0], tuning=other, truth=truth, out=tmp_path, **small)
    c = json.loads((tmp_path/"frontier.config.json").read_text())
    assert set(c) == {"name", "data", "d_in", "d_sae", "tokens", "tuning", "validation", "fidelity", "truth", "recipes"} and c["truth"] == truth.mark
    assert c["recipes"]["topk"] == get_recipe("topk", batch_size=16).to_dict()


@pytest.mark.parametrize("change", [dict(tokens=1600), dict(d_sae=31), dict(tuning=None), dict(name="other"), dict(truth=truth), dict(decay=.5)])
def test_another_configuration_is_refused_and_nothing_is_written(tmp_path, change):
    base = dict(seeds=[0], tuning=other, out=tmp_path, name="x")
    sweep(x, ["topk"], [2], **small | base)
    was = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds another sweep"): sweep(x, ["topk"], [2], **small | base | change)
    assert was == {f.name: f.read_bytes() for f in tmp_path.iterdir()}


def test_other_data_are_refused_and_new_recipes_welcome(tmp_path):
    base = dict(seeds=[0], out=tmp_path, name="x")
    sweep(x, ["topk"], [2], **small | base)
    with pytest.raises(ValueError, match="its data is"): sweep(x + 1, ["topk"], [2], **small | base)
    assert len(sweep(x, ["practical"], [2, 3], **small | base)) == 4
    with pytest.raises(ValueError, match="decay of topk"): sweep(x, [get_recipe("topk", decay=.1)], [2], **small | base)     # the first recipe is remembered
    assert len(Frontier.load(tmp_path)) == 5


def test_parts_cover_the_grid_once(tmp_path):
    args = (x, ["practical", "topk"], [2, 3])
    for i in range(3): sweep(*args, seeds=(0, 1), part=(i, 3), group=2, out=tmp_path/str(i), **small)
    cells = [[(r["recipe"], r["l0"], r["seed"]) for r in Frontier.load(tmp_path/str(i)).rows] for i in range(3)]
    assert len(sum(cells, [])) == len(set(sum(cells, []))) == 12
    assert sorted(map(str, timeless(Frontier.load(*(tmp_path/str(i) for i in range(3)))))) == sorted(map(str, timeless(sweep(*args, seeds=(0, 1), **small))))


# ------------------------------------------------------------------------------------------------ a language model
def test_language_model_and_site_alone():
    lm = LanguageModel.load("embedded")
    files = ["def f(x):\n    return x + 1\n\n"*400, "import os\n\nfor name in os.listdir('.'): print(name)\n"*200]
    import jumprelu_nb.data.text as t
    ids = t.pack(lm, files*3)
    sides = lm_splits(lm, "mlp_out.1", held_out=2000, tokens=4000)
    assert sides.tuning.shape[1] == sides.validation.shape[1] == lm.site("mlp_out.1").d_in
    f = sweep(sides.train, ["topk"], [4], seeds=[0], d_sae=64, tokens=3200, batch_size=16, validation=sides.validation, lm=lm, site="mlp_out.1", text=ids, fidelity_tokens=300, progress=False)
    a, b = f.only(recipe="topk").rows[0], f.only(recipe="random").rows[0]
    assert f.rows[0]["name"] == "mlp_out.1" and a["ce_clean"] == b["ce_clean"] and a["ce_mean"] == b["ce_mean"] and a["ce_sae"] != b["ce_sae"]
    assert a["delta_ce"] == pytest.approx(a["ce_sae"] - a["ce_clean"]) and 0 <= a["kl"] < math.inf


def test_splicing_nothing_and_the_identity():
    lm = LanguageModel.load("embedded")
    ids = lm_splits(lm, "resid_post.1", held_out=400, tokens=2000).contexts
    s = Splicer(lm, "resid_post.1", ids)
    assert s([]) == []
    class Identity(torch.nn.Module):
        d_sae, device, dtype = 4, torch.device("cpu"), torch.float32
        def forward(self, x): return x
    m = s([Identity()])[0]
    assert abs(m["delta_ce"]) < 1e-4 and m["loss_recovered_zero"] == pytest.approx(1, abs=1e-4)      # claim 24: splice the identity first


def test_validation_numbers_are_those_of_reconstruction():
    f = sweep(x, ["practical"], [3], seeds=[2], control=False, **small)
    sae = train(x, recipe="practical", l0=3, seed=2, d_sae=30, tokens=3200, batch_size=16, progress=False).sae
    m = reconstruction(sae, held).result()
    assert {k: f.rows[0][k] for k in ("fvu", "cosine", "shrinkage", "dead_fraction", "dense_fraction")} == {k: m[k] for k in ("fvu", "cosine", "shrinkage", "dead_fraction", "dense_fraction")}
