"""Class sums of the whole fleet, and the head that is solved from them (`method.share_statistics`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightcl.exchange.tensors import FLEET_HEAD, STATISTICS, Arrays, outgoing_head, outgoing_statistics
from lightcl.methods import Method
from lightcl.storage.state import under
from server.aggregation.robust import adoptable

logger = logging.getLogger("flwr")


class ClassSums:
    """`sums` is empty where the method shares no statistics; `head` until the first device has reported some."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self.sums: Arrays = {name: np.zeros_like(array) for name, array in outgoing_statistics(method).items()}
        self.head: Arrays = {}

    def update_(self, reported: Sequence[Arrays], round_number: int) -> bool:
        """Adds the sums of one round and solves the head anew; returns whether they moved.

        Sums from which no head can be solved are left out, with a warning.
        """
        if not reported:
            return False
        sums = {name: total + np.sum([given[name] for given in reported], axis=0) for name, total in self.sums.items()}
        try:
            head = outgoing_head(self._method, sums)
        except ValueError as error:
            logger.warning("round %d: its class sums are left out (%s)", round_number, error)
            return False
        if not adoptable(head, round_number):
            return False
        self.sums, self.head = sums, head
        return True

    def state(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in (self.sums | self.head).items()}

    def restore_(self, state: Mapping[str, Tensor]) -> None:
        if self.sums:
            self.sums = {f"{STATISTICS}{n}": np.array(tensor.numpy()) for n, tensor in under(state, STATISTICS).items()}
            self.head = {f"{FLEET_HEAD}{n}": tensor.numpy() for n, tensor in under(state, FLEET_HEAD).items()}
