"""The cells of a sweep: points, names, resets, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightcl.errors import RequestError
from lightcl.scenario import bundled_scenarios, method_names
from simulations.sweeps.description import SweepDescription, find_preset, load_description, presets
from simulations.sweeps.grid import Sweep, folder_name, make_sweep, parse_grid, parse_seeds

QUICKSTART = bundled_scenarios()["quickstart"]


def cells(folder: Path, changes: list[str] | None = None, only: tuple[str, ...] = (), **keys) -> Sweep:
    return make_sweep(SweepDescription.model_validate(keys), QUICKSTART, changes or [], folder, only)


def test_points_are_variants_times_the_grid_and_cells_go_seed_by_seed(tmp_path):
    sweep = cells(
        tmp_path, variants={"plain": {}, "SGD": {"method.name": "sgd"}}, seeds=[3, 1],
        grid={"training.epochs": [2, 5], "server.aggregation": ["none"]},
    )  # fmt: skip
    labels = [point.label for point in sweep.points]
    assert labels == [
        "plain, training.epochs=2, server.aggregation=none", "SGD, training.epochs=2, server.aggregation=none",
        "plain, training.epochs=5, server.aggregation=none", "SGD, training.epochs=5, server.aggregation=none",
    ]  # fmt: skip
    assert [cell.seed for cell in sweep.cells] == [3] * 4 + [1] * 4
    last = sweep.cells[-1].scenario
    assert (last.method.name, last.training.epochs, last.seed) == ("sgd", 5, 1)
    assert len({cell.name for cell in sweep.cells}) == 8
    assert sweep.baseline_of(sweep.points[3]) == sweep.points[2], "the baseline has the same values of the grid"


AXES = {
    "sharing": {
        "isolated": {"server.aggregation": "none"}, "suffix": {"server.aggregation": "suffix"},
        "sums": {"method.share_statistics": True},
    },
    "partition": {"iid": {}, "skewed": {"fleet.partition": "dirichlet", "fleet.alpha": 0.1}},
}  # fmt: skip
PLUS_AND_SGD = {"plus": {"method.name": "lightcl-plus"}, "SGD": {"method.name": "sgd"}}


def test_axes_are_named_sets_of_keys_without_combinations_that_make_no_sense(tmp_path):
    skip = [{"where": {"variant": ["SGD"], "sharing": ["sums"]}, "reason": "SGD has no sums"}]
    keys = {"variants": PLUS_AND_SGD, "axes": AXES, "skip": skip, "baseline": {"sharing": "isolated"}}
    sweep = cells(tmp_path, **keys)
    assert [point.label for point in sweep.points] == [
        "plus, isolated, iid", "SGD, isolated, iid", "plus, isolated, skewed", "SGD, isolated, skewed",
        "plus, suffix, iid", "SGD, suffix, iid", "plus, suffix, skewed", "SGD, suffix, skewed",
        "plus, sums, iid", "plus, sums, skewed",
    ]  # fmt: skip
    assert sweep.skipped == ("SGD has no sums: SGD, sums, iid; SGD, sums, skewed",)
    suffix, sums = sweep.cells[6].scenario, sweep.cells[9].scenario
    assert (suffix.server.aggregation, suffix.fleet.alpha, suffix.method.name) == ("suffix", 0.1, "lightcl-plus")
    assert (sums.server.aggregation, sums.method.share_statistics) == ("none", True)
    baselines = [sweep.baseline_of(point).label for point in sweep.points]
    assert baselines[:4] == ["plus, isolated, iid", "SGD, isolated, iid", *baselines[2:4]]
    assert baselines[7:] == ["SGD, isolated, skewed", "plus, isolated, iid", "plus, isolated, skewed"]
    limited = cells(tmp_path, only=("SGD", "suffix", "isolated", "skewed"), **keys)
    assert [point.label for point in limited.points] == ["SGD, isolated, skewed", "SGD, suffix, skewed"]
    alone = cells(tmp_path, only=("suffix", "iid"), **keys)
    assert all(alone.baseline_of(point) == point for point in alone.points), "the baseline is not run"


def test_a_named_baseline_has_the_same_values_on_the_axes(tmp_path):
    axes = {"partition": AXES["partition"]}
    sweep = cells(tmp_path, variants=PLUS_AND_SGD, axes=axes, grid={"training.epochs": [2, 5]}, baseline="SGD")
    assert sweep.points[6].label == "plus, skewed, training.epochs=5"
    assert sweep.baseline_of(sweep.points[6]).label == "SGD, skewed, training.epochs=5"


def test_a_method_keeps_what_it_can_of_the_scenario_and_resets_are_listed(tmp_path):
    changes = ["server.aggregation=suffix", "method.beta=0", "network.freeze=layer2.0"]
    sweep = cells(tmp_path, changes, grid={"method.name": ["lightcl", "pnn"]})
    lightcl, pnn = (cell.scenario for cell in sweep.cells)
    assert (lightcl.method.beta, lightcl.network.freeze, lightcl.server.aggregation) == (0, "layer2.0", "suffix")
    assert (pnn.method.name, pnn.network.freeze, pnn.server.aggregation) == ("pnn", None, "none")
    assert sweep.resets == [
        "network.freeze is the method's own instead of layer2.0 for pnn",
        "server.aggregation is none instead of suffix for pnn",
    ]
    assert [cell.name for cell in sweep.cells] == ["lightcl-seed-0", "pnn-seed-0"]


def test_all_methods_are_points_of_the_sweep_with_their_own_defaults(tmp_path):
    sweep = make_sweep(load_description(presets()["table1"]), QUICKSTART, [], tmp_path)
    assert [point.label for point in sweep.points] == method_names()
    assert sweep.seeds == [0, 1, 2, 3, 4]
    assert all(cell.scenario.method.name == cell.point.label for cell in sweep.cells)


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_can_be_planned_and_opens_with_its_command(tmp_path, name):
    assert find_preset(name).read_text().startswith("# lightcl sweep ")
    sweep = make_sweep(load_description(find_preset(name)), QUICKSTART, [], tmp_path)
    assert len(sweep.points) > 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grid": {"training.epoch": [1]}}, r"cell 'training.epoch=1': .*unknown key, did you mean 'epochs'"),
        ({"grid": {"training.epochs": [1, 0]}}, r"cell 'training.epochs=0': .*training.epochs"),
        ({"grid": {"method.name": ["sdg"]}}, r"cell 'sdg': .*unknown method"),
        ({"grid": {"method.name": ["sgd"], "method.beta": [0, 1]}}, r"cell 'sgd, method.beta=0': .*unknown key"),
        ({"grid": {"seed": [1]}}, "--seeds"),
        ({"grid": {"training.epochs": []}}, "--grid training.epochs: no values"),
        ({"grid": {"training.epochs": [1, 1]}}, "given twice"),
        ({"grid": {"method.beta": [1]}, "variants": {"x": {"method.beta": 0}}}, "choose one"),
        ({"methods": ["sdg"]}, "unknown method 'sdg', did you mean 'sgd'"),
        ({"methods": ["sgd"], "baseline": "lightcl"}, "sweep.baseline 'lightcl'"),
        ({"axes": {"sharing": {}}}, "sweep.axes.sharing: no values"),
        ({"axes": {"variant": AXES["sharing"]}}, "stand under sweep.variants"),
        ({"axes": {"a": {"x": {"seed": 1}, "y": {"trainig.epochs": 1}}}}, "cell 'y': .*unknown key"),
        (
            {"axes": {"a": {"x": {"training.epochs": 1}}}, "grid": {"training.epochs": [1]}},
            "training.epochs is set by a 'x' and by the grid; choose one",
        ),
        (
            {"axes": AXES, "skip": [{"where": {"sharig": ["sums"]}, "reason": "r"}]},
            r"sweep.skip\[0\].where.sharig: no such axis, did you mean 'sharing'",
        ),
        (
            {"axes": AXES, "skip": [{"where": {"sharing": ["sum"]}, "reason": "r"}]},
            r"sweep.skip\[0\].where.sharing: 'sum' is not on this axis, did you mean 'sums'",
        ),
        ({"axes": AXES, "baseline": {"sharing": "alone"}}, "sweep.baseline.sharing: 'alone' is not on this axis"),
        (
            {"axes": {"a": {"x": {}}}, "skip": [{"where": {"a": ["x"]}, "reason": "no sense"}]},
            "sweep.skip leaves nothing to run .no sense",
        ),
        ({"devices": [10]}, r"--device 10: the fleet has 10 devices"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": 0}, "at least one seed"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
    ],
)
def test_wrong_descriptions_are_refused(tmp_path, keys, message):
    with pytest.raises(RequestError, match=message):
        cells(tmp_path, **keys)


def test_only_some_variants(tmp_path):
    assert [p.label for p in cells(tmp_path, only=("sgd",), methods="all", baseline="er").points] == ["sgd"]
    with pytest.raises(RequestError, match="--only: unknown variant 'sdg', did you mean 'sgd'"):
        cells(tmp_path, only=("sdg",), methods="all")


def test_only_takes_the_beginning_of_a_name_in_any_case(tmp_path):
    def labels(*only: str, **keys) -> list[str]:
        return [point.label for point in cells(tmp_path, only=only, **keys).points]

    names = {"SGD, everything": {}, "SGD, the head": {"training.epochs": 1}, "Isolated": {"training.epochs": 2}}
    assert labels("iso", variants=names) == ["Isolated"]
    assert labels("sgd, THE", variants=names) == ["SGD, the head"]
    assert labels("lightcl", methods=["lightcl", "lightcl-plus"]) == ["lightcl"]  # a name is not only a beginning
    with pytest.raises(RequestError, match="--only: 'sgd' may be 'SGD, everything' or 'SGD, the head'; write more"):
        labels("sgd", variants=names)
    with pytest.raises(RequestError, match=r"allowed: 'SGD, everything', 'SGD, the head', 'Isolated'\)"):
        labels("head", variants=names)


def test_a_grid_option_is_a_list_of_yaml_values():
    assert parse_grid("training.epochs=5,30") == ("training.epochs", [5, 30])
    assert parse_grid("a.b=[1, 2],[3],1e-3,none") == ("a.b", [[1, 2], [3], 1e-3, "none"])
    for text, message in (("training.epochs", "expected KEY=VALUE"), ("a.=1", "expected KEY"), ("a.b=]", "not a list")):
        with pytest.raises(RequestError, match=message):
            parse_grid(text)


def test_seeds_are_a_number_or_a_list():
    assert parse_seeds("3") == 3
    assert parse_seeds("0,2, 5") == [0, 2, 5]
    assert parse_seeds("7,") == [7]
    for text in ("", "x", "1,-2"):
        with pytest.raises(RequestError, match="--seeds"):
            parse_seeds(text)


def test_folder_names_stay_distinct_and_short():
    names = [folder_name(label) for label in ("a b", "a-b", "a, b", "β", "γ", "x" * 300, "x" * 301, "k=1", "k-1", "..")]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 101 and "/" not in name and not name.startswith(".") for name in names)
    assert folder_name("lightcl-plus") == "lightcl-plus"


def test_a_sweep_file_is_checked(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("sweep: {scenario: quickstart, grid: {training.epochs: [1, 2]}, seeds: [4]}")
    assert load_description(file).grid == {"training.epochs": [1, 2]}
    for text, message in (
        ("sweep: {gird: {}}", "sweep.gird: unknown key, did you mean 'grid'"),
        ("sweep: {seeds: many}", "sweep.seeds"),
        ("name: x", "a sweep file has one section, sweep"),
        ("sweep: [", "not valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(RequestError, match=message):
            load_description(file)
    with pytest.raises(RequestError, match="no preset or file 'tabel1', did you mean 'table1'"):
        find_preset("tabel1")
