"Every format, from files built by the written specification: codes, reconstructions, active sets; square matrices; half precision; what the metadata say; mapped and split files; wrong files."
from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from _formats import Case, canonical, inputs, saelens, variants
from safetensors.torch import save_file

from jumprelu_nb.sae.gates import JumpReLUGate
from jumprelu_nb.sae.model import SAE
from jumprelu_nb.sae.sparse import decode_sparse, encode_sparse
from jumprelu_nb.share.exchange import convert, load_sae, recognise, save_as
from jumprelu_nb.share.files import FormatError, open_pt, open_safetensors
from jumprelu_nb.share.formats import FORMATS, TokenNormSAE

each = pytest.mark.parametrize("name", variants)


def agrees(sae:SAE, case:Case, x:torch.Tensor, tolerance:float=1e-6) -> None:
    "The same active latents, codes and reconstructions to `tolerance` of the largest number."
    f, y = case.native(x)
    codes, out = sae.encode(x.to(sae.dtype)).double(), sae(x.to(sae.dtype)).double()
    assert ((codes != 0) == (f != 0)).all(), f"{((codes != 0) != (f != 0)).sum()} latents differ"
    assert (codes - f).abs().max() <= tolerance * max(f.abs().max(), 1), (codes - f).abs().max()
    assert (out - y).abs().max() <= tolerance * max(y.abs().max(), 1), (out - y).abs().max()


@each
@pytest.mark.parametrize("d, F", [(16, 64), (32, 32)])          # a square matrix hides a wrong orientation
def test_native(name, d, F, tmp_path):
    form, make = variants[name]
    case = make(tmp_path, d, F)
    assert recognise(case.path)[0].name == form
    sae, x = load_sae(case.path, **case.given), inputs(d)
    agrees(sae, case, x)
    f = sae.encode(x)
    assert 0 < (f != 0).float().mean() < .95
    assert not any(p.requires_grad for p in sae.parameters()) and not sae.training and not sae.pre_encoder_bias
    if not isinstance(sae, TokenNormSAE):
        assert sae.scale == 1
        active = encode_sparse(sae, x)
        assert torch.allclose(active.dense() if hasattr(active, "dense") else torch.zeros(len(x), F).index_put((active.tokens, active.latents), active.values), f, atol=1e-5)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype, tmp_path):
    "The weights stay as they are, the thresholds are float32; widened, the function is that of the rounded numbers."
    form, make = variants[name]
    if form == "gemma_scope" and dtype == torch.bfloat16: pytest.skip("numpy has no bfloat16")
    case = make(tmp_path, 16, 64, dtype)
    sae = load_sae(case.path, **case.given)
    assert sae.dtype == dtype
    if isinstance(sae.gate, JumpReLUGate): assert sae.gate.param.dtype == torch.float32
    wide = load_sae(case.path, dtype=torch.float32, **case.given)
    assert wide.dtype == torch.float32
    agrees(wide, case, inputs(16), 2e-6)


@each
def test_mapped(name, tmp_path):
    "A mapped file gives the same SAE, and keeps its bytes whatever is folded."
    _, make = variants[name]
    case = make(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    a, b = load_sae(case.path, mmap=True, **case.given), load_sae(case.path, **case.given)
    for (k, v), w in zip(a.state_dict().items(), b.state_dict().values()): assert torch.equal(v, w), k
    with torch.no_grad(): a.W_enc.zero_()
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@each
def test_written_again(name, tmp_path):
    "Whatever was read can be written in its own format and in SAELens's, and means the same."
    form, make = variants[name]
    case, x = make(tmp_path/"a"), inputs(16)
    sae = load_sae(case.path, **case.given)
    for to in {form, "saelens"}:
        if to in ("openai", "sparsify", "saelens") and sae.gate.name == "groupmax" and to != "sparsify": continue
        try: save_as(sae, tmp_path/to, to)
        except ValueError as e:
            assert "files hold" in str(e) and (to == "dictionary_learning" or to == "llamascopium" and isinstance(sae, TokenNormSAE)), e
            continue
        again = load_sae(tmp_path/to, format=to)
        assert torch.equal(again.encode(x) != 0, sae.encode(x) != 0)
        assert torch.allclose(again(x), sae(x), atol=2e-5, rtol=1e-5)


def test_places(tmp_path):
    about = {n: load_sae(variants[n][1](tmp_path/str(i)).path).metadata for i, n in enumerate(variants)}
    for n, site, model in (("saelens jumprelu", "resid_post.3", "gpt2"), ("saelens 5 jumprelu", "resid_post.3", "gpt2"), ("gemma_scope", "resid_post.20", "google/gemma-2-2b"), ("gemma_scope_2", "resid_post.13", "google/gemma-3-1b-pt"),
                           ("gemma_scope_2 without config", "resid_post.13", "google/gemma-3-1b-pt"), ("dictionary_learning BatchTopKSAE", "resid_post.3", "EleutherAI/pythia-70m"), ("sparsify", "resid_post.10", None),
                           ("llamascopium jumprelu, inference", "resid_post.3", None), ("openai TopK", "resid_post.8", "gpt2")):
        assert (about[n].get("site"), about[n].get("model_name")) == (site, model), n
        json.dumps(about[n])


def test_given_goes_before(tmp_path):
    case = variants["gemma_scope"][1](tmp_path)
    sae = load_sae(case.path, model_name="mine", site="mlp_out.7")
    assert (sae.metadata["model_name"], sae.metadata["site"]) == ("mine", "mlp_out.7") and sae.metadata["given_by_caller"] == dict(model_name="mine", site="mlp_out.7")


def test_input_scale_given_or_warned_of(tmp_path):
    case = saelens("jumprelu", True, norm="expected_average_only_in")(tmp_path)
    (tmp_path/"activation_scaler.json").unlink()
    with pytest.warns(UserWarning, match="input_scale="): sae = load_sae(tmp_path)
    assert "factor" in sae.metadata["notes"][0]
    agrees(load_sae(tmp_path, input_scale=.4), case, inputs(16))


def test_negative_thresholds(tmp_path):
    "SAELens and dictionary_learning: lifted, which is the same function. Gemma Scope: refused. Nowhere: NaN."
    for name, key in (("saelens jumprelu", "threshold"), ("dictionary_learning JumpReluAutoEncoder", "threshold")):
        case = variants[name][1](tmp_path/name)
        p = canonical()
        theta = p["theta"] - .5
        if "saelens" in name: save_file(dict(W_enc=p["W"], b_enc=p["b"], W_dec=p["D"], b_dec=p["c"], threshold=theta), case.path/"sae_weights.safetensors")
        else: torch.save(dict(W_enc=p["W"], b_enc=p["b"], W_dec=p["D"], b_dec=p["c"], threshold=theta), case.path/"ae.pt")
        sae, x = load_sae(case.path), inputs(16)
        z = x.double() @ p["W"].double() + p["b"].double()
        assert torch.equal(sae.encode(x) > 0, (z > theta) & (z > 0)) and "lifted" in sae.metadata["notes"][0]
    for value in (-.1, float("nan"), float("inf")):
        case = variants["gemma_scope"][1](tmp_path/str(value))
        arrays = dict(np.load(case.path/"params.npz")); arrays["threshold"][3] = value
        np.savez(case.path/"params.npz", **arrays)
        with pytest.raises(FormatError, match="threshold"): load_sae(case.path)


@each
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poisoned(name, value, tmp_path):
    "One NaN in any tensor is found."
    form, make = variants[name]
    case = make(tmp_path)
    file = next(p for p in tmp_path.rglob("*") if p.suffix in (".safetensors", ".npz", ".pt") and "scaler" not in p.name)
    for key, tensors, put in _tensors(file):
        t = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
        t[key].view(-1)[-1] = value
        put(t)
        if key.startswith(("stats", "latents_", "dataset_average")) and (form == "openai" or "dataset-wise" not in name and name != "llamascopium pt"): load_sae(case.path, **case.given); continue
        with pytest.raises(FormatError, match="expected"): load_sae(case.path, **case.given)


def _tensors(file:Path):
    "Key, all tensors, and how to write them back."
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file
        all_, put = load_file(file), lambda t: save_file(t, file)
    elif file.suffix == ".npz": all_, put = {k: torch.from_numpy(v) for k, v in np.load(file).items()}, lambda t: np.savez(file, **{k: v.numpy() for k, v in t.items()})
    else:
        tree = torch.load(file, weights_only=True)
        inner = "ae" if "ae" in tree else "sae" if "sae" in tree else None
        all_ = tree[inner] if inner else tree
        put = lambda t: torch.save(tree | {inner: t} if inner else t, file)
    return [(k, all_, put) for k, v in all_.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and not (k == "threshold" and v.dim() == 0 and tree["config" if inner else "k"] is not None and _topk(file))]


def _topk(file:Path) -> bool: return json.loads((file.with_name("config.json")).read_text())["trainer"]["dict_class"] == "AutoEncoderTopK"


def test_split_files(tmp_path):
    "An index and its parts give what the one file gave; parts are looked for beside the index only."
    case = variants["saelens jumprelu"][1](tmp_path)
    whole = load_sae(tmp_path)
    from safetensors.torch import load_file
    t = load_file(tmp_path/"sae_weights.safetensors")
    (tmp_path/"sae_weights.safetensors").unlink()
    where = {k: f"part-{i % 2}.safetensors" for i, k in enumerate(t)}
    for part in set(where.values()): save_file({k: v for k, v in t.items() if where[k] == part}, tmp_path/part)
    index = tmp_path/"sae_weights.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=where)))
    for (k, v), w in zip(load_sae(tmp_path).state_dict().items(), whole.state_dict().values()): assert torch.equal(v, w), k
    agrees(load_sae(tmp_path), case, inputs(16))
    for bad in ("../x.safetensors", "/etc/passwd", "a/b", "..", "", "x\0y"):
        index.write_text(json.dumps(dict(weight_map=where | {"W_enc": bad})))
        with pytest.raises(FormatError, match="plain name"): load_sae(tmp_path)
    index.write_text(json.dumps(dict(weight_map=where | {"W_enc": where["W_dec"]})))
    if where["W_enc"] != where["W_dec"]:
        with pytest.raises(FormatError, match="promises"): load_sae(tmp_path)


def test_nothing_is_run(tmp_path):
    "Pickles with code, in every disguise: a reduce, a build with a state, an old-style instance, a global that is called, a class that is written into."
    case = variants["dictionary_learning BatchTopKSAE"][1](tmp_path)
    ran = tmp_path/"ran"

    class Reduce:
        def __reduce__(self): return os.system, (f"touch {ran}",)

    class Builds:
        def __reduce__(self): return dict, (), {"a": Reduce()}
    class Evals:
        def __reduce__(self): return eval, ("__import__('os').system('true')",)
    for obj in (Reduce(), dict(ae=Reduce()), dict(W=torch.zeros(2), x=Evals()), Builds(), [Evals()], torch.nn.Linear(2, 2), dict(x=print), dict(x=np.float64(1.)), dict(x={1, 2}), dict(x=b"bytes"), dict(x=1j)):
        torch.save(obj, case.path/"ae.pt")
        with pytest.raises(FormatError, match="data.pkl|encoder.weight|beside it"): load_sae(case.path)
        assert not ran.exists()
    (tmp_path/"npz").mkdir()
    np.savez(tmp_path/"npz"/"params.npz", W_enc=np.array([Reduce()], dtype=object))
    with pytest.raises(FormatError, match="pickles"): load_sae(tmp_path/"npz")
    (case.path/"ae.pt").write_bytes(pickle.dumps(Reduce()))
    with pytest.raises(FormatError, match="zip archive"): load_sae(case.path)
    assert not ran.exists()


def _program(path:Path, program:bytes) -> None:
    import zipfile
    with zipfile.ZipFile(path, "w") as z: z.writestr("a/data.pkl", program); z.writestr("a/data/0", b"\0" * 64)


@pytest.mark.parametrize("program", [
    b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.", b"\x80\x02(i__main__\nX\n.", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__X\x01\x00\x00\x00x\x86b.",
    b"\x80\x02ccollections\nOrderedDict\nN}X\x0c\x00\x00\x00__defaults__K\x01s\x86b.", b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\x02}r\xff\xff\xff\x7f.", b"\x80\x02}\x94\x93.", b"\x80\x02" + b"(" * 100_000 + b".",
    b"\x80\x02" + b"]" * 100_000 + b"\x61" * 99_999 + b".", b"\x80\x02]q\x00h\x00a.", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", b"\x80\x02K\x01."])
def test_hostile_programs(program, tmp_path):
    _program(tmp_path/"ae.pt", program)
    with pytest.raises(FormatError): load_sae(tmp_path/"ae.pt")


def test_lies_of_a_pickle(tmp_path):
    "A tensor that claims more than its storage holds, overlaps itself, or points behind the end."
    good = dict(W=torch.arange(12.).view(3, 4))
    torch.save(good, tmp_path/"a.pt")
    assert torch.equal(open_pt(tmp_path/"a.pt")["W"].read(), good["W"])
    for bad in (torch.zeros(1).expand(10**6), torch.arange(12.)[::2], torch.arange(12.).as_strided((3, 3), (1, 1))):
        torch.save(dict(W=bad), tmp_path/"b.pt")
        with pytest.raises(FormatError, match="one piece"): open_pt(tmp_path/"b.pt")
    import zipfile
    torch.save(good, tmp_path/"a.pt")
    with zipfile.ZipFile(tmp_path/"a.pt") as z: members = {i: z.read(i) for i in z.namelist()}
    key = next(k for k in members if k.endswith("data.pkl"))
    for a, b in ((b"K\x03K\x04\x86", b"K\x03K\xff\x86"), (b"K\x0ctq", b"K\xfftq")):
        assert a in members[key] or a == b"K\x0ctq"
        with zipfile.ZipFile(tmp_path/"c.pt", "w") as z:
            for k, v in members.items(): z.writestr(k, v.replace(a, b) if k == key else v)
        if a in members[key]:
            with pytest.raises(FormatError, match="one piece|storage"): open_pt(tmp_path/"c.pt")


def test_huge_sizes_are_refused_before_anything_is_allocated(tmp_path):
    head = json.dumps({"W": dict(dtype="F32", shape=[2**24, 2**20], data_offsets=[0, 2**46])}).encode()
    (tmp_path/"x.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"\0" * 64)
    with pytest.raises(FormatError, match="as its header says"): open_safetensors(tmp_path/"x.safetensors")
    head = json.dumps({"W": dict(dtype="F32", shape=[2**40, 2**40], data_offsets=[0, 64])}).encode()
    (tmp_path/"x.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + b"\0" * 64)
    with pytest.raises(FormatError, match="expected 4,8"): open_safetensors(tmp_path/"x.safetensors")
    (tmp_path/"cfg.json").write_text(json.dumps(dict(architecture="standard", d_in=10**12, d_sae=10**12)))
    (tmp_path/"sae_weights.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(FormatError, match="W_enc"): load_sae(tmp_path)


def test_enormous_configuration(tmp_path):
    variants["saelens jumprelu"][1](tmp_path)
    for text in ('{"a":' * 10**5, "[" * 10**6, '{"architecture": ' + "9" * 10**5 + "}", '{"architecture": "' + "x" * (2**23) + '"}', "", "null", "{}", '{"metadata": 1}', '{"architecture": {"a": 1}}', '{"architecture": "jumprelu", "d_in": 1e400}'):
        (tmp_path/"cfg.json").write_text(text)
        with pytest.raises(FormatError) as e: load_sae(tmp_path)
        assert len(str(e.value)) < 1500 and "\n" not in str(e.value)


def test_two_formats_in_one_folder(tmp_path):
    variants["saelens jumprelu"][1](tmp_path)
    variants["dictionary_learning BatchTopKSAE"][1](tmp_path)
    with pytest.raises(FormatError, match="Say which with format="): load_sae(tmp_path)
    assert load_sae(tmp_path, format="dictionary_learning").metadata["format"] == "dictionary_learning"


def test_convert_leaves_nothing_behind(tmp_path):
    case = variants["sparsify"][1](tmp_path/"a")
    with pytest.raises(ValueError, match="constant thresholds"): convert(case.path, tmp_path/"b", "gemma_scope")
    assert not (tmp_path/"b").exists()
    told = convert(case.path, tmp_path/"b", "dictionary_learning")
    assert told.flips == 0 and told.error < 1e-6 and told.source == "sparsify" and "ae.pt" in told.files


@pytest.mark.parametrize("to", [f for f in FORMATS])
def test_no_half_files(to, tmp_path, monkeypatch):
    "A crash while writing leaves no file that could be mistaken for an SAE."
    sae = load_sae(variants["openai ReLU"][1](tmp_path/"a").path) if to != "sparsify" else load_sae(variants["sparsify"][1](tmp_path/"a").path)
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt): save_as(sae, tmp_path/"b", to)
    assert [p for p in (tmp_path/"b").rglob("*") if p.is_file()] == []


def test_decode_sparse_of_a_loaded_one(tmp_path):
    sae, x = load_sae(variants["gemma_scope"][1](tmp_path).path), inputs(16)
    assert torch.allclose(decode_sparse(sae, encode_sparse(sae, x)), sae(x), atol=1e-5)


def test_training_goes_on_from_a_loaded_one(tmp_path):
    "Strided weights are no obstacle: an SAE from a file can be fine-tuned."
    from jumprelu_nb.sae.objectives import Together, fit  # noqa: F401
    sae = load_sae(variants["gemma_scope"][1](tmp_path).path).requires_grad_(True).train()
    loss = (sae(inputs(16)) - inputs(16)).square().sum(-1).mean()
    loss.backward()
    assert sae.W_enc.grad is not None and sae.W_enc.grad.abs().sum() > 0
