"The embedded language model is the file it claims to be, its text is split by path alone, and the code that makes such models still runs."
import hashlib, json, sys, sysconfig
from pathlib import Path
import pytest, torch, transformers
from hypothesis import given, settings, strategies as st
from jumprelu_nb.data import embedded as E, pretrain as P


@pytest.fixture(scope="module")
def model(): return transformers.AutoModelForCausalLM.from_pretrained(E.embedded_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(): return transformers.AutoTokenizer.from_pretrained(E.embedded_path())


def test_shipped_files_are_the_manifests():
    m = E.verify()
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(m["files"])
    assert sum(f["bytes"] for f in m["files"].values()) < 8_000_000
    note = (E.embedded_path() / m["licence"]["note"]).read_text("utf8")
    assert "PSF" in note and "Apache-2.0" in note and m["training"]["command"] in note


def test_shipped_json_names_no_place_of_its_making():
    for f in E.embedded_path().glob("*.json"):
        if f.name == "tokenizer.json": continue
        text = f.read_text("utf8")
        assert not any(bad in text for bad in ("/tmp", "/home", "/root", "/work", "\\\\")), f.name


def test_log_and_manifest_tell_one_story():
    log, m = E.training_log(), E.manifest()
    last = log["log"][-1]
    assert m["training"]["tokens"] == last["tokens"] and m["corpus"]["sha256"] == log["corpus_sha256"]
    for k in ("stage", "tokens", "step", "cpu_s"): assert [r[k] for r in log["log"]] == sorted(r[k] for r in log["log"]), k
    assert {r["stage"] for r in log["log"]} == {1, 2} and log["first_train_tokens"] < log["train_tokens"]
    assert m["figures"]["validation_loss"] == pytest.approx(last["val"], abs=.02)  # the weights are those of the last record


def test_loss_is_the_manifests(model, tokenizer):
    m = E.manifest()
    probe = E.token_stream(tokenizer, [m["figures"]["probe"]["text"]])[None]
    with torch.no_grad(): loss = E.next_token_loss(model(probe).logits, probe).mean().item()
    assert loss == pytest.approx(m["figures"]["probe"]["loss"], abs=1e-2)  # under any Python


def test_validation_loss_is_the_manifests(model, tokenizer):
    m, validation = E.manifest(), list(E.stdlib_texts("validation"))
    if E.corpus_sha256(E.stdlib_texts("train", m["corpus"]["tests"]), validation) != m["corpus"]["sha256"]: pytest.skip(f"needs the library of Python {m['corpus']['python']}")
    now = E.measure(model, E.validation_windows(E.token_stream(tokenizer, validation)))
    assert now["val"] == pytest.approx(m["figures"]["validation_loss"], abs=1e-2)
    assert now["ind_max"] == pytest.approx(m["figures"]["induction_score"], abs=1e-2)
    assert now["ind_layer_head"] == m["figures"]["induction_layer_head"]


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(), st.binary().map(lambda b: b.decode("latin-1")), st.binary().map(lambda b: b.decode("utf8", "replace"))))
def test_tokenizer_loses_nothing(tokenizer, text): assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_stream_has_one_bos_per_text(tokenizer):
    s = E.token_stream(tokenizer, ["a = 1\n", "", "b = 2\n"])
    assert (s == 0).sum() == 3 and s.dtype == torch.long and s[0] == 0
    with pytest.raises(ValueError, match="at least one"): E.token_stream(tokenizer, [])
    with pytest.raises(ValueError, match="fewer than one window"): E.validation_windows(s)


# ---------------------------------------------------------------- the text
def test_split_is_disjoint_stable_and_by_path_alone():
    root = Path(sysconfig.get_paths()["stdlib"])
    train, validation = E.stdlib_files("train", tests=True), E.stdlib_files("validation")
    assert not set(train) & set(validation)
    assert validation == E.stdlib_files("validation") and set(E.stdlib_files("train")) < set(train)
    for files, held in ((train, False), (validation, True)):
        for f in files: assert (int(hashlib.md5(f.relative_to(root).as_posix().encode()).hexdigest(), 16) % 20 == 0) is held


def test_corpus_is_deterministic():
    assert E.corpus_sha256(E.stdlib_texts("train"), E.stdlib_texts("validation")) == E.corpus_sha256(E.stdlib_texts("train"), E.stdlib_texts("validation"))


def held_out_name(folder=""):
    return next(f"{folder}m{i}.py" for i in range(1000) if E.is_validation(f"{folder}m{i}.py"))


def test_what_is_left_out(tmp_path):
    held, test_held = held_out_name(), held_out_name("test/")
    keep = [n for n in ("aa.py", "zz.py", "json/tool.py") if not E.is_validation(n)]
    out = ["site-packages/x.py", "dist-packages/y.py", "encodings/cp1252.py", "pydoc_data/topics.py"]
    for n in [held, test_held, "test/u.py", "lib/tests/v.py", "idlelib/idle_test/w.py", *keep, *out]:
        (tmp_path / n).parent.mkdir(parents=True, exist_ok=True); (tmp_path / n).write_text("pass\n")
    names = lambda *a: [f.relative_to(tmp_path).as_posix() for f in E.stdlib_files(*a, root=tmp_path)]
    assert names("validation") == names("validation", True) == [held]
    assert sorted(names("train")) == sorted(keep)
    assert set(names("train", True)) - set(keep) == {n for n in ("test/u.py", "lib/tests/v.py", "idlelib/idle_test/w.py") if not E.is_validation(n)}


def test_a_library_below_a_folder_called_test(tmp_path):
    root = tmp_path / "test" / "site-packages"
    root.mkdir(parents=True)
    for n in ("aa.py", held_out_name()): (root / n).write_text("pass\n")
    assert len(E.stdlib_files("train", root=root)) == len(E.stdlib_files("validation", root=root)) == 1


def test_distributions_that_strip_things(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # importing it now fails
    (tmp_path / "aa.py").write_text("x = 1\n"); (tmp_path / "bb.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(E.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert list(E.stdlib_texts("train")) == ["x = 1\n"]
    with pytest.raises(FileNotFoundError, match="no source files for validation"): list(E.stdlib_texts("validation"))


# ---------------------------------------------------------------- the trainer
TRAIN = P.train_embedded
TINY = dict(steps=40, layers=1, d_model=32, heads=2, vocab=280, context=32, batch=4, evals=2)
TEXTS = ([f"def f{i}(self, x):\n    return self.value + x * {i}\n" * 8 for i in range(20)], ["def g(self, x):\n    return self.value * x\n" * 8] * 3)


def test_training_is_deterministic_and_learns(tmp_path):
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    logs = [P.train_embedded(tmp_path / name, texts=TEXTS, **TINY) for name in "ab"]
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)
    assert logs[0]["log"][-1]["val"] < logs[0]["log"][0]["val"] - .5
    assert E.verify(tmp_path / "a")["files"] == E.verify(tmp_path / "b")["files"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tok.decode(tok.encode("def f(x):")) == "def f(x):" and model(torch.tensor([tok.encode("def f(x):")])).logits.shape[-1] == 280
    assert json.loads((tmp_path / "a" / "train_log.json").read_text())["args"]["steps"] == 40


def test_two_stages_and_one(tmp_path):
    seen = []
    two = P.train_embedded(tmp_path / "two", texts=TEXTS, report=seen.append, **TINY)["log"]
    assert [(r["stage"], r["step"], r["tokens"]) for r in two] == [(s, n, n*4*32) for s, n in ((1, 0), (1, 20), (1, 40), (2, 40), (2, 60), (2, 80))]
    assert seen[1:] == two and two[2]["val"] == two[3]["val"] and two[3]["train"] is None and two[-1]["cpu_s"] >= two[2]["cpu_s"]
    one = P.train_embedded(tmp_path / "one", first_minutes=0, texts=TEXTS, **TINY)
    assert [(r["stage"], r["step"]) for r in one["log"]] == [(1, 0), (1, 20), (1, 40)]
    assert "--first-minutes 0" in E.manifest(tmp_path / "one")["training"]["command"]


def test_time_budget_ends_training(tmp_path):
    log = P.train_embedded(tmp_path, first_minutes=.01, minutes=.01, texts=TEXTS, **{**TINY, "steps": None})
    assert 2 <= log["log"][-1]["step"] and log["log"][-1]["cpu_s"] >= 1.2


def test_second_stage_adds_the_tests_and_keeps_the_tokenizer(tmp_path, monkeypatch):
    library, suites = TEXTS[0], ["class T(TestCase):\n    def test(self): self.assertEqual(1, 1)\n" * 8] * 5
    monkeypatch.setattr(P, "stdlib_texts", lambda split, tests=False: iter(TEXTS[1] if split == "validation" else library + suites * tests))
    log = P.train_embedded(tmp_path, **TINY)
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tok.get_vocab() == P.train_tokenizer(library, 280).get_vocab() and log["first_train_tokens"] == len(E.token_stream(tok, library))
    assert log["train_tokens"] == len(E.token_stream(tok, library + suites)) and log["corpus_sha256"] == E.corpus_sha256(library + suites, TEXTS[1])
    assert log["first_corpus_sha256"] == E.corpus_sha256(library, TEXTS[1])


def test_command_passes_every_argument(monkeypatch, tmp_path):
    got = {}
    monkeypatch.setattr(P, "train_embedded", lambda **kw: got.update(kw))
    P.main(["--out", str(tmp_path)])
    usual = {k: p.default for k, p in P.signature(TRAIN).parameters.items() if k not in ("out", "texts", "report")}
    assert {k: v for k, v in got.items() if k not in ("out", "report")} == usual


@pytest.mark.parametrize("wrong, message", [(dict(steps=0), "positive"), (dict(vocab=100), "257"), (dict(texts=(["x"], ["y = 1\n" * 200])), "training text"),
                                            (dict(texts=(TEXTS[0], ["y"])), "validation text")])
def test_errors_name_the_remedy(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message): P.train_embedded(tmp_path, **{"texts": TEXTS, **TINY, **wrong})
    assert not (tmp_path / "model.safetensors").exists()


def test_command_has_help(capsys):
    with pytest.raises(SystemExit) as e: P.main(["--help"])
    assert e.value.code == 0 and "--minutes" in capsys.readouterr().out
