"""Class sums of the whole fleet, and the head that is solved from them (`method.share_statistics`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightcl.exchange.tensors import FLEET_HEAD, STATISTICS, Arrays, outgoing_head, outgoing_statistics
from lightcl.methods import Method
from lightcl.storage.state import under


class ClassSums:
    """`sums` is empty where the method shares no statistics; `head` until the first device has reported some."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self.sums: Arrays = {name: np.zeros_like(array) for name, array in outgoing_statistics(method).items()}
        self.head: Arrays = {}

    def update_(self, reported: Sequence[Arrays]) -> bool:
        """Adds the sums of one round and solves the head anew; returns whether there were any."""
        if not reported:
            return False
        for name, total in self.sums.items():
            total += np.sum([sums[name] for sums in reported], axis=0)
        self.head = outgoing_head(self._method, self.sums)
        return True

    def state(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in (self.sums | self.head).items()}

    def restore_(self, state: Mapping[str, Tensor]) -> None:
        if self.sums:
            self.sums = {f"{STATISTICS}{n}": np.array(tensor.numpy()) for n, tensor in under(state, STATISTICS).items()}
            self.head = {f"{FLEET_HEAD}{n}": tensor.numpy() for n, tensor in under(state, FLEET_HEAD).items()}
