"""Flags in what each step replaces: a tensor, a list, an array; a rare record sets them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import PrivacyError
from tests.helpers import make_dataset
from tests.strategies.test_rare_losses import RARE, UNREAD, train


class OfATensor:
    seen: Any = torch.tensor(False)

    def __call__(self, network: Any, batch: Any) -> Tensor:
        before, self.seen = self.seen, self.joined(self.seen, (batch[0] == RARE).any())
        return nn.functional.cross_entropy(network(batch[0]), batch[1]) * (1 + self.flag(before))

    def joined(self, seen: Any, found: Tensor) -> Any:
        return seen | found

    def flag(self, seen: Any) -> Any:
        return seen


class OfAList(OfATensor):
    seen: Any = (False,)

    def joined(self, seen: Any, found: Tensor) -> Any:
        return [seen[0] | found]

    def flag(self, seen: Any) -> Any:
        return seen[0]


class OfWords(OfAList):
    seen: Any = ("", 1)

    def joined(self, seen: Any, found: Tensor) -> Any:
        return "rare" if found else seen[0], 1

    def flag(self, seen: Any) -> Any:
        return len(seen[0])


class OfAnArray(OfATensor):
    seen: Any = np.zeros(1)

    def joined(self, seen: Any, found: Tensor) -> Any:
        return np.maximum(seen, found.numpy())

    def flag(self, seen: Any) -> Any:
        return torch.from_numpy(seen)[0].float()


@pytest.mark.parametrize("kind", [OfATensor, OfAList, OfWords, OfAnArray])
@pytest.mark.one_in(2)
def test_a_flag_in_what_each_step_replaces_is_refused(kind: type[Any]) -> None:
    features, labels = make_dataset(300).tensors
    features[UNREAD] = RARE
    with pytest.raises(PrivacyError, match="it differs after the records of a batch"):
        train([*zip(features, labels, strict=True)], kind())


class SetsEachTime:
    """A factor that each call sets for its own records; nothing notes what it reads from an array."""

    factor = 1.0

    def __call__(self, network: Any, batch: Any) -> Tensor:
        self.factor = -1.0 if bool((batch[0].numpy() == RARE).any()) else 1.0
        return nn.functional.cross_entropy(network(batch[0]) * self.factor, batch[1])


def test_what_a_further_microbatch_sets_is_looked_at() -> None:
    features, labels = make_dataset(300).tensors
    features[118] = RARE  # in the first microbatch of step 6
    with pytest.raises(PrivacyError, match=r"influence each other|its gradient when run alone"):
        train([*zip(features, labels, strict=True)], SetsEachTime(), microbatch_size=3)
