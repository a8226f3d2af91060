"""A run's connection to its devices: everything that its rounds need and that is built once the devices are there."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from flwr.serverapp import Grid

from lightcl.assembly import build_network
from lightcl.exchange.messages import Instruction
from lightcl.networks.pruning import channel_digest
from lightcl.networks.weights import digest
from lightcl.records.folder import RunFolder
from lightcl.records.rows import DeviceRow
from server.aggregation import Aggregator
from server.checkpoint import Saved
from server.connecting import Connections
from server.dispatch import Dispatch
from server.ledger import Entry, Ledger
from server.listeners import Listener
from server.mailbox import Mailbox
from server.nodes import Expected, Nodes
from server.phases import Phases
from server.replies import ReplyCheck


@dataclass(frozen=True)
class Session:
    """The connected devices of a run, and the shared tensors; `aggregator` is None where devices share nothing."""

    nodes: Nodes
    connections: Connections
    phases: Phases
    aggregator: Aggregator | None

    @classmethod
    def open(
        cls, grid: Grid, run_id: str, ledger: Ledger, folder: RunFolder, listener: Listener, stop: threading.Event,
        saved: Saved | None,
    ) -> Self:  # fmt: skip
        """Waits for the devices. `saved` is the point from which the run continues. Raises NobodyConnected."""
        scenario, mailbox = ledger.scenario, Mailbox(grid, stop)
        greeting = Instruction(0, run_id, scenario.model_dump_json(), saved.round if saved else 0, 0, 0, 0)
        nodes = Nodes(mailbox, Expected.of(scenario, ledger.terms), greeting, scenario.server.greeting_timeout)
        connections = Connections(scenario, mailbox, nodes, ledger, folder, listener)
        agreed = connections.connect()
        network = build_network(scenario, in_channels=agreed.channels, classes=agreed.classes)
        method = scenario.method.build(network)
        built = Aggregator(scenario, method, listener.warned, packs=not mailbox.simulated)
        aggregator = built if built.shares else None
        if aggregator and saved:
            aggregator.restore(saved.tensors, saved.version)
        check = ReplyCheck(scenario, digest(network.prefix), channel_digest(network), aggregator)
        dispatch = Dispatch(scenario, run_id, mailbox, nodes, ledger, listener, aggregator)
        return cls(nodes, connections, Phases(scenario, dispatch, check), aggregator)

    def new_rows(self, entries: Sequence[Entry], round_number: int) -> dict[int, DeviceRow]:
        """The rows of a round that begins, by device."""
        name_of = self.nodes.name_of
        return {e.number: DeviceRow(round_number, e.number, name_of(e.number), e.task, e.epochs) for e in entries}
