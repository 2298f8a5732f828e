"The benchmark scripts: they read their arguments, run at a tiny size without peers, and time what they say they time."
import importlib.util
import json
import os
import sys
import pytest
import torch
from _book import root

scripts = ("step", "inference", "memory", "end_to_end", "gpu", "peers")


@pytest.fixture(scope="module")
def bench():
    "Import a script; leaves path, environment and number of threads as they were."
    from jumprelu_nb.sae import loops
    before, threads, compiled = dict(os.environ), torch.get_num_threads(), loops.compiled()
    loops.compiled(False)                                            # compiling takes longer than all of this
    sys.path.insert(0, str(root/"bench"))
    made = {}
    def load(name):
        if name not in made:
            spec = importlib.util.spec_from_file_location(name if name.startswith("_") else f"bench_{name}", root/"bench"/f"{name}.py")
            made[name] = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = made[name]
            spec.loader.exec_module(made[name])
        return made[name]
    yield load
    sys.path.remove(str(root/"bench")); os.environ.clear(); os.environ.update(before); torch.set_num_threads(threads); loops.compiled(compiled)
    for m in made.values(): sys.modules.pop(m.__name__, None)
    for m in ("_common", "_peers"): sys.modules.pop(m, None)


def only_ours(bench, monkeypatch): monkeypatch.setattr(bench("_peers"), "missing", lambda: ["sae_lens", "dictionary_learning", "sparsify"])


@pytest.mark.parametrize("name", scripts)
def test_help(bench, name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit, match="^0$"): bench(name).main()
    out = capsys.readouterr().out
    assert "python bench/" in out and max(map(len, out.splitlines())) < 170


@pytest.mark.parametrize("words, said", [("--shape 8,16", "8,16"), ("--shape 8,16,4,40", "L0 of 40"), ("--only sl_nothing", "sl_nothing")])
def test_bad_arguments(bench, words, said, capsys):
    with pytest.raises(SystemExit) as e: bench("step").main(words.split())
    assert said in str(e.value) + capsys.readouterr().err


def test_step(bench, tmp_path, capsys):
    out = bench("step").main(["--shape", "16,256,32,8", "--rounds", "1", "--warm", "1", "--dead", ".1", "--only", "floor,ours,ours_l0,ours_topk,ours_batchtopk,ref_float32,ref_screened", "--out", str(tmp_path/"a.json")])
    rows = json.loads((tmp_path/"a.json").read_text())["results"]["tables"][0]["rows"]
    assert set(rows) == {"floor", "ours", "ours_l0", "ours_topk", "ours_batchtopk", "ref_float32", "ref_screened"}
    for name, r in rows.items():
        assert "error" not in r and r["x_floor"] > 0, (name, r)
        if name != "floor": assert abs(r["l0"]/8 - 1) < .15, (name, r)
    assert out["results"]["tables"][0]["times_as_long_cpu"]["ours"]["ref_float32"] > 0 and "one dense product" in capsys.readouterr().err


def test_who_is_missing_is_said(bench, monkeypatch, capsys):
    only_ours(bench, monkeypatch)
    peers = bench("_peers")
    names = peers.chosen(None, peers.TRAINING)
    assert names[0] == "floor" and not any(n[:3] in ("sl_", "dl_", "sp_") for n in names) and "peers.py" in capsys.readouterr().err


def test_best_of_both(bench):
    table = lambda on, ours, theirs: {"shape": "8,16,4,2", "threads": 1, "dead": 0., "allocator_setting": on, "rows": {"floor": {"x_floor": 1.}, "ours": {"x_floor": ours}, "sl_jumprelu": {"x_floor": theirs}}}
    (r,) = bench("step").best_of_both([table(False, .5, 10.), table(True, .6, 7.)])
    assert r["times_as_long"] == {"ours": {"sl_jumprelu": 14.}}


def test_inference(bench, monkeypatch):
    only_ours(bench, monkeypatch)
    (t,) = bench("inference").main("--shape 16,256,32,8 --rounds 1 --warm 1 --only ours,ours_list,ours_list_encode,ours_screened,ref_list,ref_screened".split())["results"]["tables"]
    assert all("error" not in r for r in t["rows"].values())
    assert all(t["rows"][n]["difference"] < 1e-5 and abs(t["rows"][n]["l0"]/8 - 1) < .15 for n in ("ours", "ours_list", "ours_screened", "ref_screened"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(bench):
    r = bench("memory").measure("ours_l0", bench("_peers").Shape(16, 256, 64, 8), 2)
    assert r["parameters_mb"] == round(4*(2*16*256 + 2*256 + 16)/2**20, 1) and abs(r["l0"]/8 - 1) < .15


def test_end_to_end(bench, monkeypatch, tmp_path):
    e2e = bench("end_to_end")
    monkeypatch.setattr(e2e, "missing", lambda: ["sae_lens"]); monkeypatch.setattr(e2e, "BUDGETS", (.5, 1.))
    e2e.main(f"--data toy --d-sae 32 --l0 3 --tokens 4000 --batch 500 --held-out 500 --out {tmp_path/'a.json'}".split())
    (found,) = json.loads((tmp_path/"a.json").read_text())["results"]["data"]
    assert len(found["ours"]) == 1 and found["ours"][0]["fvu"] > 0 and not found["theirs"]
    a = e2e.parser().parse_args("--data toy --d-sae 32 --l0 3 --tokens 4000".split())
    rows, held = e2e.read("toy", 4000, 500, None)
    goal = dict(kind="topk", variant="default", lr=1., coefficient=None, seed=0, fvu=1e9, l0=3., cpu=10., wall=10.)
    r = e2e.answer(goal, rows, held, a, 0, lambda r: r, {})
    assert r["reached"] and r["times_sooner"] == round(10/r["seconds"], 2) and len(r["runs"]) == 1
    assert not e2e.answer(goal | {"fvu": -1.}, rows, held, a, 0, lambda r: r, {})["reached"]


def test_gpu_without_a_gpu(bench, tmp_path, capsys, monkeypatch):
    gpu = bench("gpu")
    if not torch.cuda.is_available():
        assert gpu.main([]) is None and "no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "missing", lambda: ["sae_lens"])
    gpu.main(f"--device cpu --tiny --shape 16,256,32,8 --only ours,ours_list,ref_list --sections step equality pieces --out {tmp_path/'a.json'}".split())
    torch.set_float32_matmul_precision("highest")
    got = json.loads((tmp_path/"a.json").read_text())["results"]
    rows = {s["section"]: s["rows"] for s in got["sections"]}
    assert list(rows) == ["step", "equality", "pieces"] and not got["failures"]
    assert rows["equality"]["list"]["differ"] == 0 and rows["step"]["ours_list"]["ms"] > 0 and rows["step"]["ours_list"]["listed_per_token"] >= 8


@pytest.mark.parametrize("screen", [False, True])
def test_reference_takes_the_step_of_autograd(bench, screen):
    "The yardstick must do all of the work: its gradients are those of the dense graph, clipped to norm 1."
    from jumprelu_nb.sae.ste import heaviside, jumprelu
    peers = bench("_peers")
    p = peers.Problem(peers.Shape(32, 256, 64, 8))
    ref = peers.Reference(p, screen, price=.3, window=1.)
    W, D, b, c, theta = (q.detach().clone().requires_grad_() for q in ref.P)
    x, eps = p.x[0], torch.tensor(1.)
    z = (x - c) @ W.T + b
    f = jumprelu(z, theta, eps, "rectangle", False)
    loss = (f @ D + c - x).square().sum(1).mean() + .3*heaviside(z, theta, eps, "rectangle", False).sum(1).mean()
    loss.backward()
    want = [q.grad for q in (W, D, b, c, theta)]
    norm = torch.stack([g.norm() for g in want]).norm()
    ref.step(x)
    for name, g, q in zip(("W_enc", "W_dec", "b_enc", "b_dec", "θ"), want, ref.P):
        assert torch.allclose(q.grad, g/norm, atol=2e-6), (name, float((q.grad - g/norm).abs().max()))


def test_screen_finds_the_float32_candidates(bench):
    peers, g = bench("_peers"), torch.Generator().manual_seed(0)
    for scale in (1., 1e-3, 1e3):
        x, W, b = torch.randn(64, 48, generator=g)*scale, torch.randn(512, 48, generator=g), torch.randn(512, generator=g)*scale
        low = (torch.randn(512, generator=g)*.3 + 12)*scale
        z = (x.double() @ W.double().T + b.double())
        r, c, v = peers.Screen(64, 512, 48).weights(W, b, low)(x)
        got = torch.zeros(64, 512, dtype=torch.bool); got[r, c] = True
        sure = (z - low.double()).abs() > 1e-5*scale
        assert torch.equal(got & sure, (z > low.double()) & sure) and got.any()
