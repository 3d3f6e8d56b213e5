"""Gaussian noise: its scale and shape, that nothing predicts it, and that none of it comes twice."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dp.noise import GaussianNoise
from lightning_dp.noise import sources as normals

DTYPES = [torch.float32, torch.float64]
CHUNK = 1 << 16


def use(backend: str, patch: pytest.MonkeyPatch) -> None:
    """Have the fast variant draw from one of its two generators."""
    if backend == "mkl":
        pytest.importorskip("mkl_random")
    else:
        patch.setattr(normals, "_mkl_generator", lambda: None)


@pytest.fixture(params=["mkl", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use(request.param, monkeypatch)


@pytest.fixture(params=["fast-mkl", "fast-torch", "secure"])
def secure(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    variant, _, generator = request.param.partition("-")
    if generator:
        use(generator, monkeypatch)
    return bool(variant == "secure")


def scale_is_right(sample: torch.Tensor, std: float) -> bool:
    """Chi-square test of the variance; false-alarm rate 2e-8 (two tails of 1e-8)."""
    statistic = (sample.double() / std).square().sum().item()
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], df=sample.numel())
    return bool(low < statistic < high)


def draw(noise: GaussianNoise, size: int = 64, std: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return noise.add_(torch.zeros(size, dtype=dtype), std)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("std", [1.0, 0.013, 700.0])
def test_std_is_what_was_asked(secure: bool, std: float, dtype: torch.dtype) -> None:
    """100,000 coordinates: the test bound is 2.5 % of the variance."""
    sample = draw(GaussianNoise(secure=secure), 100_000, std, dtype)
    assert scale_is_right(sample, std)
    for wrong in (2 / 3, 3 / 2):
        assert not scale_is_right(sample, std * wrong)
        assert not scale_is_right(draw(GaussianNoise(secure=secure), 100_000, std * wrong, dtype), std)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distribution_is_normal_and_centred(secure: bool, dtype: torch.dtype) -> None:
    """Kolmogorov-Smirnov over 200,000 coordinates, false-alarm rate 1e-7; uniform noise of the same variance fails."""
    sample = draw(GaussianNoise(secure=secure), 200_000, 2.0, dtype).numpy()
    assert stats.kstest(sample, "norm", args=(0.0, 2.0)).pvalue > 1e-7
    uniform = (np.random.default_rng(0).random(200_000) - 0.5) * 2.0 * math.sqrt(12)
    assert stats.kstest(uniform, "norm", args=(0.0, 2.0)).pvalue < 1e-7


def test_coordinates_are_uncorrelated(secure: bool) -> None:
    """Lags 1, 2, one chunk and one round of streams, n > 130,000; false-alarm rate 6e-7 a lag (5 sigma)."""
    sample = draw(GaussianNoise(secure=secure), 400_000, dtype=torch.float64)
    for lag in (1, 2, CHUNK, 4 * CHUNK):
        products = sample[lag:] * sample[:-lag]
        assert abs(products.mean().item()) < 5 / math.sqrt(products.numel())


@pytest.mark.parametrize("size", [1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK + 3])
def test_every_coordinate_gets_its_own_noise(secure: bool, size: int) -> None:
    """On the grid of the secure variant 0 and equal pairs happen: at rates 4e-7, and 1/2 size^2 2.7e-7; the bounds fail
    in < 1e-9.
    """
    sample = draw(GaussianNoise(secure=secure), size, dtype=torch.float64)
    large = secure and size > 1000
    assert int((sample == 0).sum()) <= (8 if large else 0)
    assert sample.unique().numel() >= (0.95 * size if large else size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_added_to_what_is_there(secure: bool, dtype: torch.dtype) -> None:
    base = torch.linspace(-1000, 1000, 2 * CHUNK + 5, dtype=dtype)
    tensor = base.clone()
    assert GaussianNoise(secure=secure).add_(tensor, 0.5) is tensor
    assert scale_is_right(tensor - base, 0.5)
    assert not scale_is_right(tensor - base, 0.75)


@pytest.mark.parametrize("generator", ["mkl", "torch", "numpy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_to_fill_is_to_add_to_zeros(
    generator: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was there, and call by call: filled, added, filled from the same streams."""
    use(generator, monkeypatch)
    if generator == "numpy":
        monkeypatch.setattr(normals, "_has_known_layout", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    one, other = GaussianNoise(seed=3), GaussianNoise(seed=3)
    for size in (1, 5, CHUNK // 2, 3 * CHUNK + 7):
        filled = torch.full((size,), torch.nan, dtype=dtype)
        assert one.fill_(filled, 1.7) is filled
        assert torch.equal(filled, draw(other, size, 1.7, dtype))
        assert torch.equal(draw(one, size, 0.3, dtype), draw(other, size, 0.3, dtype))
    assert scale_is_right(filled, 1.7)
    assert not scale_is_right(filled, 1.7 * 1.5)


def test_to_fill_with_secure_noise_keeps_to_the_grid() -> None:
    filled = GaussianNoise(secure=True).fill_(torch.full((50_000,), torch.nan, dtype=torch.float64), 2.0)
    assert scale_is_right(filled, 2.0)
    assert not scale_is_right(filled, 3.0)
    assert torch.equal(filled * 2.0**19, (filled * 2.0**19).round())


def test_to_fill_without_noise_writes_zeros() -> None:
    assert torch.equal(GaussianNoise().fill_(torch.full((3, 2), torch.nan), 0.0), torch.zeros(3, 2))


@pytest.mark.usefixtures("backend")
def test_any_shape_and_leaves_that_require_grad() -> None:
    parameter = torch.nn.Parameter(torch.zeros(30, 40))
    GaussianNoise().add_(parameter, 1.0)
    assert scale_is_right(parameter.detach(), 1.0)
    assert not scale_is_right(parameter.detach(), 1.5)


def test_instances_and_calls_never_repeat(secure: bool) -> None:
    first, second = GaussianNoise(secure=secure), GaussianNoise(secure=secure)
    draws = torch.stack([draw(first), draw(first), draw(second), draw(second)])
    assert draws.unique().numel() > 0.99 * draws.numel()


@pytest.mark.usefixtures("backend")
def test_seed_reproduces_whatever_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            noise = GaussianNoise(seed=5)
            results.append(torch.cat([draw(noise, 5 * CHUNK), draw(noise, 10)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert not torch.equal(
        results[0], torch.cat([draw(GaussianNoise(seed=6), 5 * CHUNK), draw(GaussianNoise(seed=6), 10)])
    )


def test_global_seeds_do_not_predict_noise(secure: bool) -> None:
    results = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        results.append(draw(GaussianNoise(secure=secure)))
    assert not bool((results[0] == results[1]).any())


@pytest.mark.usefixtures("backend")
def test_global_generators_are_not_used_up() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw(GaussianNoise())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda noise: pickle.loads(pickle.dumps(noise))])
def test_copies_have_fresh_entropy(duplicate: object, seed: int | None) -> None:
    noise = GaussianNoise(seed=seed)
    twins = [duplicate(noise) for _ in range(2)]  # type: ignore[operator]
    draws = torch.stack([draw(each) for each in (noise, *twins)])
    assert draws.unique().numel() > 0.99 * draws.numel()


def test_pickle_holds_no_state_and_keeps_the_variant() -> None:
    assert pickle.dumps(GaussianNoise(seed=1)) == pickle.dumps(GaussianNoise(seed=2))
    assert pickle.loads(pickle.dumps(GaussianNoise(secure=True))).secure


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("seed", [None, 1])
def test_forked_child_does_not_repeat_the_parent(secure: bool, seed: int | None) -> None:
    noise = GaussianNoise(secure=secure, seed=None if secure else seed)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, draw(noise).numpy().tobytes())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        from_child = np.frombuffer(pipe.read(), np.float64)
    assert from_child.size == 64
    assert np.isin(from_child, draw(noise).numpy()).sum() <= 1  # chance on the secure variant's grid: two in < 1e-6


def test_secure_works_without_the_cryptography_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    sample = draw(GaussianNoise(secure=True), 100_000, 3.0)
    assert scale_is_right(sample, 3.0)
    assert not scale_is_right(sample, 2.0)


def test_zero_std_changes_nothing() -> None:
    tensor = torch.ones(10)
    assert torch.equal(GaussianNoise().add_(tensor, 0.0), torch.ones(10))


@pytest.mark.parametrize("std", [math.nan, math.inf, -1.0])
def test_std_out_of_range_is_refused(std: float) -> None:
    tensor = torch.zeros(3)
    with pytest.raises(ValueError, match=f"0 <= std < inf, got std={std}"):
        GaussianNoise().add_(tensor, std)
    assert torch.equal(tensor, torch.zeros(3))


@pytest.mark.parametrize("std", [1e-50, 1e39])
def test_std_that_float32_cannot_hold_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match=r"range of torch\.float32"):
        GaussianNoise().add_(torch.zeros(3), std)
    assert bool((draw(GaussianNoise(), 3, std) != 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_low_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"dtype={dtype}"):
        GaussianNoise().add_(torch.zeros(3, dtype=dtype), 1.0)


def test_non_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        GaussianNoise().add_(torch.zeros(4, 4).T[:, ::2], 1.0)


def test_secure_refuses_a_seed() -> None:
    with pytest.raises(ValueError, match="seed=None with secure=True, got seed=1"):
        GaussianNoise(seed=1, secure=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_noise(secure: bool) -> None:
    torch.cuda.manual_seed_all(0)
    first = GaussianNoise(secure=secure).add_(torch.zeros(100_000, device="cuda"), 2.0).cpu()
    torch.cuda.manual_seed_all(0)
    second = GaussianNoise(secure=secure).add_(torch.zeros(100_000, device="cuda"), 2.0).cpu()
    assert scale_is_right(first, 2.0)
    assert not scale_is_right(first, 3.0)
    assert (first == second).float().mean() < 0.01


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("std", [0.0, 1.0])
def test_a_buffer_that_requires_grad_is_written_without_graph(secure: bool, std: float) -> None:
    buffer = torch.full((3,), 5.0, requires_grad=True)
    noise = GaussianNoise(secure=secure)
    noise.fill_(buffer, std)
    assert bool((buffer.detach() != 5).all())
    noise.add_(buffer, std)
    assert buffer.is_leaf
    assert buffer.grad_fn is None
