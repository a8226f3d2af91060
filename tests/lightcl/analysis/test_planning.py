"""Which settings are tried, in which order, and which is chosen."""

import pytest

from lightcl.analysis.planning import candidates, choose
from lightcl.assembly import build_stream
from lightcl.errors import RequestError
from lightcl.scenario import Scenario
from tests.lightcl import toys


def found(**sections):
    scenario = toys.scenario(**sections)
    source = toys.source(size=16)
    stream = build_stream(scenario, source, toys.whole(source), 0)
    return scenario, candidates(scenario, stream, (3, 16, 16))


def test_the_given_scenario_comes_first_and_the_head_only_last():
    scenario, settings = found(network={"weights": "none", "width": 4, "freeze": "layer2"})
    assert settings[0].scenario.method == scenario.method
    assert settings[0].keys["network.freeze"] == "layer2.1"
    assert settings[0].departure == (False, 0.0, 0, 0, 0)
    assert settings[-1].keys["network.freeze"] == "layer4.1"
    departures = [s.departure for s in settings]
    assert departures == sorted(departures)
    dense = [s.keys["network.freeze"] for s in settings if s.sparsity == 0 and not s.head_alone]
    assert list(dict.fromkeys(dense)) == ["layer2.1", "layer3.0", "layer3.1", "layer4.0"]


def test_halvings_by_hand():
    """Batch 8 goes to 4; memory 5 to 2 and 1. Fewest halvings first, among equals the larger memory."""
    _, settings = found()
    first = [s for s in settings if s.frozen_further == 0 and s.sparsity == 0]
    sizes = [(s.keys["training.batch_size"], s.keys["method.memory_size"]) for s in first]
    assert sizes == [(8, 5), (4, 5), (8, 2), (4, 2), (8, 1), (4, 1)]


@pytest.mark.parametrize(
    ("sections", "smallest"),
    [
        ({"method": {"preset": "paper"}}, 2),
        ({"network": {"frozen_batch_norm": "train"}}, 2),
        ({"method": {"preset": "paper", "memory_batch_norm": "eval"}, "network": {"frozen_batch_norm": "eval"}}, 1),
    ],
)
def test_every_setting_is_a_scenario_that_can_be_run(sections, smallest):
    """Memory 5 goes to 2; 1 sample has no batch statistics."""
    _, settings = found(**sections)
    assert min(s.keys["method.memory_size"] for s in settings) == smallest
    for setting in settings:
        Scenario.model_validate(setting.scenario.model_dump())


PLUS = {"name": "lightcl-plus", "statistics_mb": 0.002}
"""Room for the 16 channels of layer3 (1,920 bytes) and not for the 32 of layer4 (5,824)."""


def test_freeze_points_that_the_method_cannot_be_built_on_are_left_out():
    _, settings = found(method=PLUS)
    assert {s.keys["network.freeze"] for s in settings} == {"layer3.1"}


def test_without_a_possible_freeze_point_the_methods_reason_is_given():
    with pytest.raises(RequestError, match=r"method.statistics_mb is 0.002, but lightcl-plus needs at least"):
        found(method=PLUS, network={"freeze": "layer4.0"})


def test_sparse_settings_come_after_dense_ones():
    _, settings = found()
    sparse = [s for s in settings if s.sparsity > 0 and not s.head_alone]
    assert {s.keys["method.name"] for s in sparse} == {"lightcl-sparse"}
    assert {s.sparsity for s in sparse} == {0.5, 1.0}
    assert min(settings.index(s) for s in sparse) > max(
        i for i, s in enumerate(settings) if s.sparsity == 0 and not s.head_alone
    )
    assert sparse[0].scenario.method.beta == 0.001  # LightCL's own keys go along


def test_the_first_that_fits_is_chosen():
    _, settings = found()
    assert choose(settings, settings[0].footprint.peak) is settings[0]
    chosen = choose(settings, settings[0].footprint.peak - 1)
    assert chosen.footprint.peak < settings[0].footprint.peak
    place = settings.index(chosen)
    assert place > 0
    assert all(s.footprint.peak >= settings[0].footprint.peak for s in settings[:place])


def test_a_budget_that_no_setting_fits():
    _, settings = found()
    smallest = min(s.footprint.peak for s in settings)
    assert choose(settings, smallest).footprint.peak == smallest
    with pytest.raises(RequestError, match=f"nothing fits; the smallest setting needs {smallest / 2**20:.1f} MiB"):
        choose(settings, smallest - 1)


def test_only_lightcl_can_be_planned():
    with pytest.raises(RequestError, match=r"plan: method sgd has no .* \(allowed: lightcl, "):
        found(method={"name": "sgd"})


def test_a_shared_suffix_is_never_frozen_entirely():
    _, settings = found(server={"aggregation": "suffix"})
    assert "layer4.1" not in {s.keys["network.freeze"] for s in settings}
