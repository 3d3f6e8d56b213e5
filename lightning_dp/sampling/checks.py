"""Checks of loaders: each refusal says what was found, why it is refused, and what to do instead."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_dp.system.torch_private import wrapped_sampler

SAMPLINGS = ("poisson", "shuffle", "cyclic")
_HOW = "Leave `sampler` and `batch_sampler` out (`shuffle=True` is fine): the private loader draws the samples itself."


def check_count(name: str, value: object, smallest: int) -> None:
    """Raise unless ``value`` is an integer of at least ``smallest``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected an integer, got {name}={value!r}. Pass an int.")
    if value < smallest:
        raise ValueError(f"Expected {name} >= {smallest}, got {name}={value}. Raise it.")


def check_loader(loader: object, sampling: str) -> DataLoader[Any]:
    """Return the loader, if private draws can replace its own.

    Raises:
        TypeError: not a plain ``DataLoader``, or a dataset without the access or the length the sampling needs.
        ValueError: a sampler, batch sampler or option that has a meaning of its own.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"Expected sampling to be one of {SAMPLINGS}, got sampling={sampling!r}. Pass one of these.")
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"Expected a torch.utils.data.DataLoader for training, got {type(loader).__name__}. Private sampling needs "
            "to know dataset, batch size and collate function: return one DataLoader. An iterable of batches trains "
            'under sampling="shuffle" with neighboring_relation="replace_one" and a target_delta.'
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise TypeError(
            f"Expected a loader that iterates as DataLoader does, got {type(loader).__name__} with an `__iter__` of "
            "its own, which private sampling would bypass. Move that code into the dataset or `collate_fn`."
        )
    if not getattr(loader, "in_order", True):
        raise ValueError(
            "Expected in_order=True, got in_order=False. Batches would then arrive in an order that depends on how "
            "long their samples take to load, which no accountant covers. Remove the option."
        )
    if isinstance(loader.dataset, IterableDataset):
        _check_iterable(loader, sampling)
    else:
        _check_sampler(loader, num_samples=dataset_length(loader.dataset))
    return loader


def check_options(
    sampling: str,
    *,
    is_stream: bool,
    num_batches_kept: int | None,
    has_extra_records: bool,
    has_unit: bool,
    records_per_unit: int | None,
    fixed_order: bool,
    public_assignment: int | None,
) -> None:
    """Raise ValueError for options of ``private_dataloader`` that conflict with each other or with the dataset."""
    if has_extra_records and (is_stream or num_batches_kept is not None):
        raise ValueError(
            "Expected a whole dataset with random access for extra_records, got a stream or a part of one. Canaries "
            "need their place among the records: audit with gradient canaries, and without overfit_batches."
        )
    if is_stream and num_batches_kept is not None:
        raise ValueError(
            f"Expected num_batches_kept=None for an iterable dataset, got num_batches_kept={num_batches_kept}. "
            "Limit the dataset itself."
        )
    if has_unit != (records_per_unit is not None):
        raise ValueError(
            f"Expected unit and records_per_unit together, got records_per_unit={records_per_unit} "
            f"{'with' if has_unit else 'without'} a unit. Pass both to protect users, none to protect records."
        )
    if is_stream and has_unit:
        raise ValueError(
            "Expected a dataset with random access for a unit, got a stream. Users are drawn before their records are "
            "read: give the dataset random access, or join each user's records to one record."
        )
    if fixed_order and not is_stream:
        raise ValueError(
            "Expected fixed_order for a stream only, got fixed_order=True for data with random access. Use "
            'sampling="cyclic".'
        )
    if public_assignment is not None and (sampling != "cyclic" or public_assignment < 0):
        raise ValueError(
            f'Expected a public_assignment >= 0 for sampling="cyclic" only, got '
            f"public_assignment={public_assignment} for "
            f"sampling={sampling!r}. Leave it out."
        )


def dataset_length(dataset: object) -> int:
    """Return the number of records; raise if it is unknown or zero."""
    try:
        size = len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError) as error:
        raise TypeError(
            f"Expected a dataset with a length, got {type(dataset).__name__} without `__len__`. The sampling "
            "probability is batch size / number of records: define `__len__`."
        ) from error
    if size < 1:
        raise ValueError(
            f"Expected a dataset with at least one record, got len(dataset)={size}. "
            "Check how the data are loaded and filtered."
        )
    return size


def check_once(dataset: object, size: int) -> None:
    """Raise ValueError if ``Subset`` and ``ConcatDataset`` make several records out of one."""
    for source, positions in sources(dataset, np.arange(size)):
        repeated = len(positions) - len(np.unique(positions))
        if repeated:
            raise ValueError(
                f"Expected each record once, got {repeated} repeated records of {type(source).__name__}, by Subset or "
                "ConcatDataset. Such a record counts several times in one batch, so that clipping does not bound it. "
                "Weight the loss instead, or pass records_per_unit and unit, with equal ids for copies."
            )


def sources(dataset: Any, positions: NDArray[Any]) -> list[tuple[Any, NDArray[Any]]]:
    """Return the datasets below ``Subset`` and ``ConcatDataset``, each with the positions that are read from it."""
    if type(dataset) is Subset:
        indices = np.asarray(dataset.indices)
        return sources(dataset.dataset, indices[positions]) if indices.dtype.kind in "iu" else []
    if type(dataset) is not ConcatDataset:
        return [(dataset, positions % size if (size := dataset_length(dataset)) else positions)]
    starts = [0, *dataset.cumulative_sizes]
    found: dict[int, tuple[Any, list[NDArray[Any]]]] = {}
    for part, start, end in zip(dataset.datasets, starts, starts[1:], strict=False):
        inside = positions[(start <= positions) & (positions < end)] - start
        for source, own in sources(part, inside):
            found.setdefault(id(source), (source, []))[1].append(own)
    return [(source, np.concatenate(parts)) for source, parts in found.values()]


def _check_iterable(loader: DataLoader[Any], sampling: str) -> None:
    name = type(loader.dataset).__name__
    if sampling == "poisson":
        raise TypeError(
            f"Expected a map-style dataset for Poisson sampling, got the IterableDataset {name}. Records that can only "
            "be read in order cannot join each step independently, and an epsilon that assumes it would be too small. "
            'Use a map-style dataset, or sampling="shuffle" with neighboring_relation="replace_one" and a target_delta '
            "(without amplification)."
        )
    if sampling == "cyclic":
        raise TypeError(
            f"Expected a map-style dataset for cyclic sampling, got the IterableDataset {name}. Its order is its own. "
            'Use sampling="shuffle", with fixed_order=True if it yields the same order in every pass.'
        )
    if loader.batch_size is None:
        raise ValueError(_no_batch_size(name))


def _no_batch_size(name: str) -> str:
    return (
        f"Expected a DataLoader with a batch size, got batch_size=None over {name}. What one item holds is then up to "
        "the dataset, and the share of one record in it is unknown. Let the dataset return single samples and state "
        "`batch_size`."
    )


def _check_sampler(loader: DataLoader[Any], num_samples: int) -> None:
    if loader.batch_sampler is None:
        raise ValueError(_no_batch_size(type(loader.dataset).__name__))
    if type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            f"Expected the default batch sampler, got batch_sampler={type(loader.batch_sampler).__name__}. Which "
            f"records meet in a batch must be drawn independently. {_HOW}"
        )
    sampler = unwrap_sampler(loader.batch_sampler.sampler)
    kind = type(sampler)
    if isinstance(sampler, WeightedRandomSampler):
        raise ValueError(
            "Expected every record to be drawn with the same probability, got sampler=WeightedRandomSampler. A record "
            "with a large weight joins more steps than batch size / dataset size says, so its epsilon would be larger "
            f"than the one reported. Weight the loss instead. {_HOW}"
        )
    if isinstance(sampler, SubsetRandomSampler):
        raise ValueError(
            f"Expected a sampler over the whole dataset, got sampler=SubsetRandomSampler over {len(sampler)} of "
            f"{num_samples} records: the sampling probability would be taken from the wrong number of records. Use "
            "torch.utils.data.Subset(dataset, indices) as the dataset."
        )
    if kind not in (SequentialSampler, RandomSampler, DistributedSampler):
        raise ValueError(
            f"Expected one of torch's SequentialSampler, RandomSampler or DistributedSampler, got "
            f"sampler={kind.__name__}. Its probabilities are unknown, and private sampling would not use them. {_HOW}"
        )
    if isinstance(sampler, RandomSampler) and sampler.replacement:
        raise ValueError(
            "Expected sampling without replacement, got RandomSampler(replacement=True). A record could count several "
            f"times in one batch, so that clipping does not bound it. {_HOW}"
        )
    drawn = len(sampler.dataset if isinstance(sampler, DistributedSampler) else sampler)  # type: ignore[arg-type]
    if drawn != num_samples:
        raise ValueError(
            f"Expected a sampler over the whole dataset, got {kind.__name__} over {drawn} of {num_samples} records: "
            f"the sampling probability would be taken from the wrong number of records. Use torch.utils.data.Subset to "
            f"select records. {_HOW}"
        )


def unwrap_sampler(sampler: Sampler[Any] | Any) -> Any:
    """Return the user's own sampler, without the wrappers by which Lightning splits it over processes."""
    if isinstance(sampler, DistributedSampler) and type(sampler).__name__ in (
        "DistributedSamplerWrapper",
        "UnrepeatedDistributedSamplerWrapper",
    ):
        return wrapped_sampler(sampler)
    return sampler
