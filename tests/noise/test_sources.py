"""Sources of normals: how each is seeded, what it draws, and which one is taken."""

from __future__ import annotations

import builtins
import math
import secrets
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_dp.noise import GaussianNoise
from lightning_dp.noise import sources as normals
from tests.cases import each

CHUNK = 1 << 15


def some_seed() -> np.random.SeedSequence:
    return np.random.SeedSequence(secrets.randbits(256))


def draws(stream: Callable[[Tensor, float], object], num: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.empty(num, dtype=dtype)
    stream(values, 1.0)
    return values


@pytest.fixture
def no_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normals, "_mkl_generator", lambda: None)


@pytest.fixture
def looked_up_anew() -> Iterator[None]:
    """Whether MKL works is looked up once a process."""
    normals._mkl_generator.cache_clear()
    yield
    normals._mkl_generator.cache_clear()


def test_the_whole_state_of_torchs_generator_is_filled() -> None:
    """Seeding it would leave 2^32 streams; two of ours must differ in (almost) all of 624 words, and draw normals."""
    states = []
    for _ in range(2):
        stream = normals._torch_stream(some_seed())
        generator = stream.__closure__[0].cell_contents
        states.append(generator.get_state().numpy()[normals._STATE_WORDS].view(np.uint64))
        values = draws(stream, 200_000)
        assert abs(float(values.mean())) < 5 / math.sqrt(200_000)
        assert abs(float(values.var()) - 1) < 5 * math.sqrt(2 / 200_000)
    assert (states[0] != states[1]).sum() > 600
    reachable = torch.Generator().manual_seed(int(states[0][0])).get_state().numpy()
    assert (reachable[normals._STATE_WORDS].view(np.uint64) != states[0]).sum() > 600


@pytest.mark.usefixtures("no_mkl")
def test_another_layout_of_the_state_falls_back_to_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert normals._has_known_layout()
    monkeypatch.setattr(normals, "_STATE_BYTES", 5000)
    assert not normals._has_known_layout()
    noise = GaussianNoise(seed=3)
    values = noise.add_(torch.zeros(200_000), 2.0)
    assert abs(float(values.var()) / 4 - 1) < 5 * math.sqrt(2 / 200_000)
    assert torch.equal(values, GaussianNoise(seed=3).add_(torch.zeros(200_000), 2.0))


def mkl_words(state: object) -> np.ndarray:
    """Key and counter, as MKL keeps them."""
    return np.frombuffer(state.get_state()[1][20:52], np.uint32)  # type: ignore[attr-defined]


def test_mkl_gets_256_bits_of_the_seed() -> None:
    """Of 400 words of 32 random bits, every bit is set in some 200: in fewer than 100 or more than 300 with chance <
    1e-20.
    """
    pytest.importorskip("mkl_random")
    words = []
    for _ in range(50):
        seed = some_seed()
        state = normals.normal_stream(seed).__closure__[0].cell_contents
        assert state.get_state()[0] == "ARS5"
        assert np.array_equal(mkl_words(state), seed.generate_state(8))
        words.append(mkl_words(state))
    bits = np.unpackbits(np.concatenate(words).view(np.uint8).reshape(-1, 4), axis=1)
    assert len(np.unique(np.concatenate(words))) > 395
    assert np.all((bits.sum(axis=0) > 100) & (bits.sum(axis=0) < 300))


@each("bit", [0, 13, 31])
@each("word", range(4))
def test_every_word_of_mkls_key_gives_another_stream(word: int, bit: int) -> None:
    """No values in the same place (float64: none by chance), and no correlation: |r| < 5.3 / sqrt(n), false alarm
    1e-7.
    """
    generator = pytest.importorskip("mkl_random").MKLRandomState
    words = some_seed().generate_state(8)
    other = words.copy()
    other[word] ^= np.uint32(1 << bit)
    first, second = (generator(each, brng="ARS5").normal(0.0, 1.0, 4 * CHUNK, "ICDF") for each in (words, other))
    assert (first == second).sum() <= 1
    assert abs(np.mean(first * second)) < 5.3 / math.sqrt(first.size)


def test_mkl_draws_ars5_under_its_key() -> None:
    """Five rounds of AES on the counter, written out below, then the inverse of the distribution function."""
    generator = pytest.importorskip("mkl_random").MKLRandomState
    words = some_seed().generate_state(8)
    words[4] = 2**32 - 2  # the counter carries
    words_drawn = np.concatenate([ars5(words[:4], words[4:], block) for block in range(8)])
    found = generator(words, brng="ARS5").normal(0.0, 1.0, 32, "ICDF")
    np.testing.assert_allclose(found, stats.norm.ppf((words_drawn ^ 2**31) / 2**32), rtol=0, atol=1e-6)


def ars5(key: np.ndarray, counter: np.ndarray, block: int) -> np.ndarray:
    """Salmon et al. 2011, section 4.1: AES rounds whose keys are a Weyl sequence, in place of AES's key schedule."""
    weyl = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
    start = int.from_bytes(counter.tobytes(), "little") + block
    state = np.frombuffer((start % 2**128).to_bytes(16, "little"), np.uint8)
    halves = [int(half) for half in key.view(np.uint64)]

    def round_key(number: int) -> np.ndarray:
        return np.array(
            [(half + number * step) % 2**64 for half, step in zip(halves, weyl, strict=True)], np.uint64
        ).view(np.uint8)

    state = state ^ round_key(0)
    for number in range(1, 6):
        columns = SBOX[state].reshape(4, 4)  # [column, row]
        columns = np.stack([np.roll(columns[:, row], -row) for row in range(4)], axis=1)
        if number < 5:
            columns = np.stack(
                [
                    DOUBLE[columns[:, row]]
                    ^ DOUBLE[columns[:, (row + 1) % 4]]
                    ^ columns[:, (row + 1) % 4]
                    ^ columns[:, (row + 2) % 4]
                    ^ columns[:, (row + 3) % 4]
                    for row in range(4)
                ],
                axis=1,
            )
        state = columns.reshape(16) ^ round_key(number)
    return state.view(np.uint32)


def times(left: int, right: int) -> int:
    """Product in AES's field."""
    product = 0
    for bit in range(8):
        product ^= (left if right >> bit & 1 else 0) << bit
    for bit in range(14, 7, -1):
        product ^= 0x11B << (bit - 8) if product >> bit & 1 else 0
    return product


def substitute(byte: int) -> int:
    """AES's table: the inverse in the field, then an affine map of its bits."""
    inverse = next((other for other in range(256) if times(byte, other) == 1), 0)
    rotated = [(inverse << shift | inverse >> (8 - shift)) & 255 for shift in range(5)]
    return rotated[0] ^ rotated[1] ^ rotated[2] ^ rotated[3] ^ rotated[4] ^ 0x63


SBOX = np.array([substitute(byte) for byte in range(256)], np.uint8)
DOUBLE = np.array([times(byte, 2) for byte in range(256)], np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mkls_normals(dtype: torch.dtype) -> None:
    """Kolmogorov-Smirnov and chi-square over 400,000 values in chunks, lags about a chunk, two streams; false alarm
    1e-6.
    """
    pytest.importorskip("mkl_random")
    first, second = (
        torch.cat([draws(stream, size, dtype) for size in [CHUNK] * 12 + [6784]]).double()
        for stream in (normals.normal_stream(some_seed()) for _ in range(2))
    )
    num = first.numel()
    assert stats.kstest(first.numpy(), "norm").pvalue > 1e-7
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], df=num)
    assert low < first.square().sum().item() < high
    for wrong in (2 / 3, 3 / 2):
        assert not low < (first / wrong).square().sum().item() < high
    for lag in (1, 2, 3, 4, CHUNK - 1, CHUNK, CHUNK + 1):
        assert abs((first[lag:] * first[:-lag]).mean().item()) < 5.5 / math.sqrt(num - lag)
    for shift in (0, 1, CHUNK):
        assert abs((first[shift:] * second[: num - shift]).mean().item()) < 5.5 / math.sqrt(num - shift)
    if dtype == torch.float64:
        assert first.unique().numel() == num  # one draw on 2^32 values would meet itself 19 times


@pytest.mark.slow
def test_mkls_tails() -> None:
    """4e7 values: |z| > 5 some 23 times, outside 2 to 60 with chance 2e-8 (Poisson); torch's cut at 5.77 is not there
    by 1e9.
    """
    pytest.importorskip("mkl_random")
    stream, values, beyond = normals.normal_stream(some_seed()), torch.empty(1 << 16), 0
    for _ in range(40_000_000 // values.numel()):
        stream(values, 1.0)
        beyond += int((values.abs() > 5).sum())
        assert float(values.abs().max()) < 8.3
    assert 2 <= beyond <= 60


def broken_import(error: Exception) -> Callable[..., object]:
    original = builtins.__import__

    def find(name: str, *args: object, **keywords: object) -> object:
        if name == "mkl_random":
            raise error
        return original(name, *args, **keywords)  # type: ignore[arg-type]

    return find


@pytest.mark.usefixtures("looked_up_anew")
def test_without_mkl_torch_draws_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ModuleNotFoundError("No module named 'mkl_random'", name="mkl_random")
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(builtins, "__import__", broken_import(absent))
        assert normals._mkl_generator() is None


@pytest.mark.usefixtures("looked_up_anew")
@pytest.mark.parametrize(
    "error",
    [
        ImportError("libmkl_rt.so.3: cannot open shared object file"),
        ModuleNotFoundError("No module named 'numpy.core.x'", name="numpy.core.x"),
        ValueError("numpy.dtype size changed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_mkl_warns_once_and_torch_draws(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = np.random.SeedSequence(1)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", broken_import(error))
        with pytest.warns(UserWarning, match=f"working mkl-random, got {type(error).__name__}.*reinstall") as caught:
            streams = [normals.normal_stream(seeds) for _ in range(3)]
    assert len(caught) == 1
    expected = draws(normals._torch_stream(seeds), 100)
    assert torch.equal(draws(streams[0], 100), expected)


@pytest.mark.usefixtures("looked_up_anew")
@pytest.mark.parametrize(
    ("wrong", "what"), [("MT19937", "not the key and the counter"), ("ARS5", "draws other values")]
)
def test_an_mkl_that_does_not_draw_ars5_is_not_used(wrong: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does on a processor without AES: its own errors are not reported, and memory is left as it was."""
    package = pytest.importorskip("mkl_random")
    original = package.MKLRandomState

    class Silent:
        def __init__(self, seed: np.ndarray, brng: str) -> None:
            self._state = original(seed, brng=wrong)

        def get_state(self) -> tuple[str, bytes]:
            return self._state.get_state()  # type: ignore[no-any-return]

        def normal(self, loc: float, scale: float, size: int, method: str) -> np.ndarray:
            return np.zeros(size)

    monkeypatch.setattr(package, "MKLRandomState", Silent)
    with pytest.warns(UserWarning, match=what):
        assert normals._mkl_generator() is None
