"evaluate/frontier: what protects the reading of curves and teaches nobody."
from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings, strategies as st

from jumprelu_nb.evaluate.frontier import Frontier, Point, Ratio, Table, draw, interpolate

positive = st.floats(1e-3, 1e3)


def row(recipe="a", l0=8., seed=0, fvu=.1, **more):
    return dict(name="x", recipe=recipe, l0=l0, seed=seed, lr=1., d_sae=8, tokens=10, setup="s", l0_measured=l0, fvu=fvu) | more


# ------------------------------------------------------------------------------------------------ interpolate
@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1., 500.), min_size=2, max_size=6, unique=True), positive, st.floats(-3, 3), st.floats(0, 1))
def test_power_laws_are_read_exactly(l0s, a, b, where):
    lo, hi = min(l0s), max(l0s)
    l0 = math.exp(math.log(lo) + where*(math.log(hi) - math.log(lo)))
    value, why = interpolate(l0s, [a*x**b for x in l0s], l0)
    assert why == "" and value == pytest.approx(a*l0**b, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(1., 500.), positive), min_size=1, max_size=6, unique_by=lambda p: p[0]), st.floats(.5, 1000.), st.sampled_from(["log", "linear"]))
def test_never_beyond_the_neighbours_inside_and_never_far_outside(points, l0, scale):
    l0s, values = zip(*points)
    value, why = interpolate(l0s, values, l0, scale)
    assert math.isnan(value) == bool(why)
    if min(l0s) <= l0 <= max(l0s): assert min(values)*(1 - 1e-9) <= value <= max(values)*(1 + 1e-9)
    if l0 > max(l0s)*1.1001 or l0 < min(l0s)/1.1001: assert "outside" in why
    if l0 in l0s: assert value == pytest.approx(dict(points)[l0], rel=1e-9)
    assert interpolate(l0s[::-1], values[::-1], l0, scale)[1] == why


def test_equal_l0s_are_averaged_and_junk_is_left_out():
    assert interpolate([8., 8., 16.], [.1, .3, .1], 8.)[0] == pytest.approx(.2)
    nan, inf = math.nan, math.inf
    assert interpolate([8., 0., nan, inf, 12., 16.], [.4, 9., 9., 9., nan, .2], 8.)[0] == pytest.approx(.4)
    assert interpolate([8., 12., 16.], [.4, inf, .2], 12.)[0] == pytest.approx(interpolate([8., 16.], [.4, .2], 12.)[0])
    assert interpolate([], [], 8.)[1] == "nothing was measured"


def test_a_nonpositive_value_elsewhere_does_not_forbid_a_reading():
    assert interpolate([8., 16., 32.], [.4, .2, -.01], 10.)[1] == ""
    assert "no logarithm" in interpolate([8., 16., 32.], [.4, .2, -.01], 20.)[1]
    assert interpolate([8., 16., 32.], [.4, .2, -.01], 20., "linear")[1] == ""


def test_the_margin():
    for m in (1., 1.05, 1.3):
        assert interpolate([8., 16.], [.2, .1], 16*m*.999, margin=m)[1] == ""
        assert interpolate([8., 16.], [.2, .1], 16*m*1.01, margin=m)[1] != ""
        assert interpolate([8.], [.2], 8/m/1.01, margin=m)[1] != ""


# ------------------------------------------------------------------------------------------------ rows and curves
def test_duplicates_count_once_and_the_first_stays():
    f = Frontier([row(fvu=.1), row(fvu=.2)]) + Frontier([row(fvu=.3), row(seed=1)])
    assert [r["fvu"] for r in f.rows] == [.1, .1] and len(f) == 2


def test_rows_are_copied():
    r = row()
    Frontier([r]).rows[0]["fvu"] = 9
    assert r["fvu"] == .1


@pytest.mark.parametrize("column", ["name", "setup", "d_sae", "tokens"])
def test_what_cannot_be_compared_is_refused(column):
    f = Frontier([row(), row(seed=1, **{column: "other"})])
    for read in (lambda: f.at(8), lambda: f.table([8]), lambda: f.plot(), lambda: f.summary(), lambda: f.compare("a", "a", [8])):
        with pytest.raises(ValueError, match=f"differ in {column}"): read()


def test_nothing_and_unknown():
    assert Frontier([]).at(8) == {} and len(Frontier([]).table([8]).rows) == 1 and repr(Frontier([])).startswith("Frontier(0 cells")
    with pytest.raises(ValueError, match="No metric 'mcc'"): Frontier([row()]).at(8, "mcc")
    with pytest.raises(FileNotFoundError, match="No cells"): Frontier.load()


def test_the_control_is_last():
    f = Frontier([row("random"), row("b"), row("a")])
    assert list(f.curves()) == ["b", "a", "random"] and [r[0] for r in f.table([8]).rows] == ["L0", "b", "a", "random"]


def test_all_cells_failed():
    f = Frontier([row(), dict(name="x", recipe="b", l0=8., seed=0, lr=1., setup="s", d_sae=8, tokens=10, failed="diverged")])
    assert f.at(8)["b"] == Point({}, {0: "diverged"}) and f.table([8]).rows[2][1] == "–"
    assert f.compare("a", "b", [8])[8] == Ratio({}, {0: "diverged"}, 0)
    assert math.isnan(f.compare("a", "b", [8])[8].mean)


def test_missing_metric_in_some_rows():
    f = Frontier([row(mcc=.5), row("b")])
    assert f.at(8, "mcc")["b"].missing == {0: "nothing was measured"} and f.at(8, "mcc")["a"].values == {0: .5}


def test_wins_follow_the_direction_of_the_metric():
    f = Frontier([row(mcc=.9, kl=.2), row("b", mcc=.8, kl=.1)])
    assert f.compare("a", "b", [8], "mcc")[8].wins == 1 and f.compare("a", "b", [8], "kl")[8].wins == 0
    assert f.compare("a", "b", [8], "fvu")[8].wins == 0      # a tie is no win


def test_only_takes_values_and_collections():
    f = Frontier([row(seed=s) for s in range(4)])
    assert len(f.only(seed=1)) == 1 and len(f.only(seed=(1, 2))) == 2 and len(f.only(seed=[])) == 0 and len(f.only(nothing=3)) == 0


# ------------------------------------------------------------------------------------------------ files
def test_files_are_strict_json_and_nan_comes_back(tmp_path):
    f = Frontier([row(fvu=math.nan), row(seed=1, fvu=math.inf), row(seed=2, fvu=1/3)])
    lines = f.save(tmp_path/"f.jsonl").read_text().splitlines()
    def refuse(s): raise AssertionError(s)
    assert [json.loads(x, parse_constant=refuse)["fvu"] for x in lines] == [None, None, 1/3]
    back = Frontier.load(tmp_path)
    assert math.isnan(back.rows[0]["fvu"]) and back.rows[2] == f.rows[2]
    assert Frontier.load(f.save(tmp_path/"g.jsonl", digits=3)).rows[2]["fvu"] == .333


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="a sweep writes them"): Frontier.load(tmp_path)


# ------------------------------------------------------------------------------------------------ tuning
def trial(recipe, lr, l0, seed, fvu, **more): return row(recipe, l0, seed, 99., lr=lr, tuning_l0_measured=l0, tuning_fvu=fvu) | more


def test_a_learning_rate_that_only_moved_l0_is_not_better():
    "×4 has lower FVU in every cell, because its L0 came out a fifth higher: at matched L0 it is worse"
    law = lambda l: l**-.6
    cells = [trial("a", lr, l0, 0, worse*law(l0*moved), tuning_l0_measured=l0*moved) for lr, worse, moved in ((.5, 1.5, 1.), (1., 1., 1.), (4., 1.05, 1.2)) for l0 in (8., 16., 32.)]
    assert all(a["tuning_fvu"] > b["tuning_fvu"] for a, b in zip(cells[3:6], cells[6:]))
    f = Frontier(cells)
    assert f.best_lr() == {"a": 1.}
    assert f.tuning()["a"][4.]/f.tuning()["a"][1.] == pytest.approx(1.05)


def test_what_diverged_once_is_not_chosen():
    cells = [trial("a", lr, l0, s, lr) for lr in (.25, .5, 1.) for l0 in (8., 16.) for s in (0, 1)]
    cells[0] = {k: v for k, v in cells[0].items() if "tuning" not in k and k not in ("fvu", "l0_measured")} | dict(failed="diverged")
    assert Frontier(cells).best_lr() == {"a": .5}
    gone = [dict(name="x", recipe="a", l0=8., seed=0, lr=lr, failed="diverged") for lr in (1., 2.)]
    with pytest.raises(ValueError, match="failed at least once"): Frontier(gone).best_lr()


def test_no_common_l0():
    cells = [trial("a", 1., 8., 0, .1), trial("a", 2., 8., 0, .1, tuning_l0_measured=16.)]
    with pytest.raises(ValueError, match="no common L0"): Frontier(cells).best_lr()


# ------------------------------------------------------------------------------------------------ pictures
@pytest.mark.parametrize("log_y", [True, False])
def test_svg_is_well_formed_and_escaped(log_y):
    panels = {"<a> & 'b'": {"r<1>": [(8., .3, .2, .4), (16., .2, .1, .3)], "random": [(8., .9, .9, .9)]}, "one point": {"r<1>": [(8., .5, .5, .5)]}}
    root = ET.fromstring(draw(panels, "F\"V'U", log_y))
    assert root.attrib["role"] == "img" and "F\"V'U" in root.attrib["aria-label"]
    assert "nan" not in draw(panels, "x", log_y)
    w, h = map(float, root.attrib["viewBox"].split()[2:])
    for c in root.iter("{http://www.w3.org/2000/svg}circle"): assert 0 < float(c.attrib["cx"]) < w and 0 < float(c.attrib["cy"]) < h


def test_picture_has_a_panel_per_data_set(tmp_path):
    f = Frontier([row(l0=l, name=n, recipe=r, fvu=1/l) for l in (8., 16.) for n in ("one", "two", "three") for r in ("a", "b", "random")])
    svg = f.picture(tmp_path/"p.svg").read_text()
    assert all(f">{n}<" in svg for n in ("one", "two", "three", "a", "b", "random")) and len(svg) < 20_000


def test_plot_whiskers():
    f = Frontier([row(seed=s, fvu=v) for s, v in enumerate((.1, .2, .4))])
    e = f.plot().data[0].error_y
    assert e.array[0] == pytest.approx(.4 - .7/3, rel=1e-3) and e.arrayminus[0] == pytest.approx(.7/3 - .1, rel=1e-3)


def test_table_is_html_too():
    t = Table([["<L0>", "1"], ["a", "2"]], "about & more")
    assert "&lt;L0&gt;" in t._repr_html_() and "about &amp; more" in t._repr_html_() and repr(t).splitlines()[1].startswith("<L0>")
