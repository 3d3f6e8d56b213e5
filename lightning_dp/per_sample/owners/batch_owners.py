"""Owners of the rows of a batch's tensors: by position, by an index in the batch, or as declared by the user.

The owner of a row is the sample that it belongs to. These name owners:

    axis of B entries     entry b belongs to sample b
    list of B things      thing b belongs to sample b
    ``sample_of_row``     in the batch or on the module: an index for the tensors with as many rows, or one per tensor
                          name
    ``batch``, ``ptr``    of a batch of graphs: an index for its nodes, or for those of each kind; an edge belongs to
                          the graph of its first node
    ``PackedSequence``    an index from its ``batch_sizes``
    whole numbers         of a tensor of R rows that nothing else describes: the sample of each row, in the order of
                          the samples, also in the first column of a table; lengths that add up to R; positions
                          0 ... R at which samples begin and end
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_dp.errors import PrivacyError
from lightning_dp.per_sample._torch import unfollowed
from lightning_dp.per_sample.owners.batch_reading import Container, Path, read
from lightning_dp.per_sample.owners.counting import counted
from lightning_dp.per_sample.owners.following import Follower
from lightning_dp.per_sample.owners.memo import Memo
from lightning_dp.per_sample.owners.noting import note_packed, note_records
from lightning_dp.per_sample.owners.owned import Mixed, Owners, Rows

Kind = tuple[Any, str]
"""Axis and name of an index; axis "each" for a list with one thing for each sample."""

KEY = "sample_of_row"
_NAMELESS = Mixed("a tensor of the batch whose owners nothing names")
_TWO_WAYS = Mixed("a tensor as long as unequal parts of records together, whose owners the batch does not name clearly")


class BatchOwners:
    """The tensors of a run's batches whose rows have known owners at every batch size.

    Args:
        module: may have an attribute or a method ``sample_of_row(batch)``.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kinds: dict[Path, list[Kind]] | None = None  # the best first
        self._sizes: set[int] = set()
        self._shown: list[Tensor] = []  # show the arrays of a batch, and are noted as long as they live

    def learn(self, batch: Any, size: int) -> None:
        """Record how a batch of ``size`` samples names the owners of rows; keep only facts true for all
        batches seen.
        """
        things, containers = read(batch)
        indices = {**self._indices(batch, containers, size, Memo()), **counted(things, size, Memo(), learns=True)}
        seen = {path: _kinds_of(path, thing, size, indices) for path, thing in things}
        if (known := self._kinds) is not None:
            seen = {path: seen[path] & {*known[path]} for path in seen.keys() & known.keys()}
        self._sizes.add(size)
        self._kinds = {path: _ranked(path, kinds) for path, kinds in seen.items()}

    def has_learned(self, size: int) -> bool:
        """Tell whether a batch of that size was seen."""
        return size in self._sizes

    @property
    def was_seen(self) -> bool:
        """True if :meth:`learn` has seen a batch."""
        return self._kinds is not None

    @property
    def has_indices(self) -> bool:
        """True if batches name owners by an index, or by a list with one entry per sample."""
        known = [kinds[0] for kinds in (self._kinds or {}).values() if kinds]
        return any(name != "sample" or axis == "each" for axis, name in known)

    def forget(self) -> None:
        """Forget all batches seen so far."""
        self._kinds, self._sizes = None, set()

    def note(self, batch: Any, follower: Follower) -> None:
        """Pass the owner of each row of a batch's tensors to the follower.

        Raises:
            PrivacyError: an index does not fit the number of samples.
        """
        with unfollowed():
            self._note(batch, follower)

    def _note(self, batch: Any, follower: Follower) -> None:
        # one size alone does not tell samples from other things of which there are as many
        known = (self._kinds or {}) if len(self._sizes) > 1 else {}
        things, containers = read(batch)
        self._shown = []
        indices = self._indices(batch, containers, follower.size, follower.memo)
        has_counted, settled = False, list[Path]()
        for path, thing in things:
            if settled and any(path[: len(done)] == done for done in settled):
                continue
            kinds = known.get(path, ())
            fitting = [kind for kind in kinds if _is_of(kind, thing, follower.size, indices)]
            if not has_counted and _may_count(kinds, fitting):
                indices, has_counted = indices | counted(things, follower.size, follower.memo), True
                fitting = [kind for kind in kinds if _is_of(kind, thing, follower.size, indices)]
            if fitting and follower.size > 1:  # a record alone may lack an axis
                stay = ("given",) if has_counted else ("given", "counted")
                known[path] = [kind for kind in kinds if kind in fitting or kind[1].startswith(stay)]
            found = fitting[0] if fitting else None
            if isinstance(thing, Tensor):
                joined = follower.tracker.joined
                joins = not joined.isdisjoint(thing.shape) and tuple(thing.shape) not in joined
                found = _settled(fitting, thing, follower, indices) if joins else found
                follower.note(thing, _TWO_WAYS if joins and not found else _owners_of(found, thing, follower, indices))
                if found is not None and found[1] != "sample":  # other records may have other numbers of rows
                    follower.chosen.add(thing)
            elif found is not None and isinstance(thing, PackedSequence):
                note_packed(thing, follower)
            elif found is not None:
                settled.append(path)
                self._shown += note_records(thing, follower)

    def _indices(self, batch: Any, containers: Iterable[Container], size: int, memo: Memo) -> dict[str, Rows]:
        """Return the owner indices of a batch by name, each with the sample of every row, node or edge."""
        named: dict[str, Rows] = {}
        given = getattr(self._module, KEY, None)
        given = given(batch) if callable(given) else given
        if given is not None:
            _add_given(named, given, size, f"the module's {KEY}")
        for path, container in containers:
            if KEY in container:
                _add_given(named, container[KEY], size, KEY)
            if _is_graph(container):
                named[f"nodes {path}"] = _nodes_of(container, size)
        found = {name: memo.hold(rows) for name, rows in named.items()}
        for path, container in containers:
            nodes = found.get(f"nodes {_of_first_nodes(path)}")
            edges = container.get("edge_index")
            if nodes is None or not isinstance(edges, Tensor):
                continue
            if edges.dim() == 2 and len(edges) == 2 and not edges.is_floating_point():
                of_edges = memo.at(nodes, edges[0])
                assert of_edges is not None
                found[f"edges {path}"] = memo.hold(of_edges)
        return found


def _owners_of(kind: Kind | None, tensor: Tensor, follower: Follower, named: Mapping[str, Rows]) -> Owners:
    """Return the owners of the rows of a batch's tensor; mixed if nothing in the batch names them."""
    if kind is None:
        return _NAMELESS
    axis, name = kind
    assert isinstance(axis, int)
    return (follower.samples(tensor.device) if name == "sample" else named[name]).moved(axis)


def _settled(kinds: list[Kind], tensor: Tensor, follower: Follower, named: Mapping[str, Rows]) -> Kind | None:
    """Return the kind of a tensor at which unequal parts of records may be joined; None if two kinds name other owners.

    It is not known whether the parts or the records are as many as its rows.
    """
    joined = follower.tracker.joined
    left = [kind for kind in kinds if kind[1] != "sample" or kind[0] == "each" or tensor.shape[kind[0]] not in joined]
    if left and left[0][1].startswith("given "):
        return left[0]
    owners = {id(getattr(_owners_of(kind, tensor, follower, named), "index", None)) for kind in left}
    return left[0] if len(owners) == 1 else None


def _add_given(found: dict[str, Rows], given: Any, size: int, where: str) -> None:
    for name, index in given.items() if isinstance(given, Mapping) else [("", given)]:
        index = torch.as_tensor(index)
        found[f"given {name}"] = _checked(index, size, f"{where}[{name!r}]" if name else where)


def _checked(index: Tensor, size: int, where: str) -> Rows:
    """Return the owners that an index names."""
    whole = index.dim() == 1 and not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    low, high = map(int, index.aminmax()) if whole and index.numel() else (0, 0)
    if not whole or not 0 <= low <= high < max(1, size):
        got = f"shape={tuple(index.shape)}, dtype={index.dtype}" + (f", max={high}" if whole else "")
        raise PrivacyError(
            f"Expected {where} to give each row one of {size} samples by its position 0 to {size - 1}, got {got}. The "
            "collate function must hold as many samples as were drawn, in their order."
        )
    copied = index.to(torch.int64, copy=True)  # the step may write to its batch
    return Rows(0, copied, layout={"bounds": (low, high)} if index.numel() else None)


def _of_first_nodes(path: Path) -> Path:
    """Return the path of the container of the nodes from which edges go: their own one, or, of a kind of edges named by
    kind of nodes, relation, kind of nodes, the one of the first kind.
    """
    is_of_kinds = bool(path) and isinstance(path[-1], tuple) and len(path[-1]) == 3
    return (*path[:-1], path[-1][0]) if is_of_kinds else path


def _is_graph(container: Mapping[str, Any]) -> bool:
    marks = [isinstance(container.get(key), Tensor) for key in ("batch", "ptr")]
    return all(marks) or (any(marks) and any("edge" in key for key in container))


def _nodes_of(container: Mapping[str, Any], size: int) -> Rows:
    """Return the graph of every node."""
    batch, ptr = container.get("batch"), container.get("ptr")
    if isinstance(ptr, Tensor):
        num = max(0, ptr.shape[0] - 1)
        if not isinstance(batch, Tensor):
            batch = torch.arange(num, device=ptr.device).repeat_interleave(ptr.diff())
    else:
        num = int(batch.max()) + 1 if isinstance(batch, Tensor) and batch.numel() else 0
    if not isinstance(batch, Tensor) or num != size:
        raise PrivacyError(
            f"Expected a batch of {size} graphs as drawn, got {num}. The collate function drops or adds records, so "
            "rows would be dealt to the wrong ones: filter the dataset before fit instead."
        )
    return _checked(batch, size, "batch")


def _kinds_of(path: Path, thing: Any, size: int, indices: Mapping[str, Rows]) -> set[Kind]:
    """Return the possible kinds (axis and index name) of an object in a batch, inferred from lengths."""
    named = {"given ", f"given {path[-1] if path else ''}"}
    kinds: list[Kind] = [("each", "sample"), (0, "packed"), (0, "sample")]
    for name in indices:
        if name in named or not name.startswith("given "):
            kinds += [(0, name), (1, name)] if name.startswith("edges") else [(0, name)]
    return {kind for kind in kinds if _is_of(kind, thing, size, indices)}


def _is_of(kind: Kind, thing: Any, size: int, indices: Mapping[str, Rows]) -> bool:
    """Tell whether an object in a batch has the lengths of a kind."""
    axis, name = kind
    if isinstance(thing, PackedSequence):
        return name == "packed" and int(thing.batch_sizes[0]) == size
    if not isinstance(thing, Tensor):
        return axis == "each" and len(thing) == size
    if axis == "each" or not (name == "sample" or name in indices):
        return False
    shape, num = thing.shape, size if name == "sample" else indices[name].num
    if axis == 1:
        return num != 2 and shape == (2, num)
    return len(shape) > 0 and shape[0] == num


def _may_count(kinds: Iterable[Kind], fitting: Iterable[Kind]) -> bool:
    """Tell whether numbers that only seem to name owners are needed: graphs and the user name them better."""
    return all(name == "sample" for _, name in fitting) and any(name.startswith("counted") for _, name in kinds)


def _ranked(path: Path, kinds: set[Kind]) -> list[Kind]:
    """Return the kinds whose lengths a tensor has, the one first that describes it best."""
    return sorted(kinds, key=lambda kind: (_rank(path, kind[1]), not kind[1].endswith(f" {path[:-1]}"), str(kind)))


def _rank(path: Path, name: str) -> int:
    """Return the rank of an index name for a tensor, if lengths allow several names; the lowest rank wins."""
    of_edges = bool(path) and ("edge" in str(path[-1]) or path[-1] == "E")
    kind = name.split(" ")[0]
    last = ["edges", "nodes", "sample"] if of_edges else ["nodes", "sample", "edges"]
    order = ["given", "packed", *last, "counted"]
    return order.index(kind) * 2 - (name != "given " and kind == "given")
