"""`lightcl server check`: what a server can check without images."""

from __future__ import annotations

import pytest

from lightcl.errors import RequestError
from server.commands.check import check_scenario
from tests.inprocess import small
from tests.simulations.test_command_line import lightcl


def test_what_a_fleet_would_send() -> None:
    assert check_scenario(small(), 1) == "The boards share no weights (server.aggregation is 'none')."
    text = check_scenario(small(server={"aggregation": "suffix+head"}), 1)
    # width 4, frozen up to layer3: layer4 has conv1 32x16x9, conv2 32x32x9, shortcut 32x16 and conv1, conv2 32x32x9
    # = 32,768 weights; five batch norms of 4 x 32; a head of 4 x 32 + 4
    assert (
        text == f"Each board sends 27 tensors, {4 * (32768 + 5 * 128 + 132) / 1024:.0f} KiB per round, with 4 classes."
    )


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"network": {"freeze": "auto"}}, "run `lightcl analyze` where images are"),
        ({"network": {"freeze": "layer9"}}, "is not a block of this network"),
        ({"network": {"freeze": "layer4"}, "server": {"aggregation": "suffix"}}, "has nothing to share"),
    ],
)
def test_what_it_refuses(sections: dict[str, dict[str, object]], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        check_scenario(small(**sections), 1)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert lightcl(monkeypatch, "server", "check", "quickstart", "--channels", 1) == 0
    assert capfd.readouterr().out.startswith("quickstart: valid for 10 boards.")
    assert lightcl(monkeypatch, "server", "check", "quickstart", "--set", "network.freeze=auto") == 2
