"""Noise drawn ahead: used once, for what it was drawn for, private in children and copies, and never in the way."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_dp.noise import GaussianNoise
from lightning_dp.noise import gaussian as noise_module
from lightning_dp.noise import sources as normals

NUM = 200_000
CHUNK = 1 << 16
CPU = torch.device("cpu")
AHEAD = 7.0  # what the stream of a marked generator holds


def marked(monkeypatch: pytest.MonkeyPatch, stream: Callable[[Tensor, float], object] | None = None) -> GaussianNoise:
    """Noise whose values drawn ahead come from ``stream``, by default all 7, which no normal is."""
    noise = GaussianNoise()
    monkeypatch.setattr(
        noise_module, "normal_stream", lambda seed: stream or (lambda chunk, std: chunk.fill_(AHEAD * std))
    )
    return noise


def draw(noise: GaussianNoise, num: int = NUM, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise.add_(torch.zeros(num, dtype=dtype), std)


def prepared(noise: GaussianNoise, num: int = NUM, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    noise.prepare(num, dtype, CPU)
    return draw(noise, num, std, dtype)


@pytest.fixture(params=["mkl", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "mkl":
        pytest.importorskip("mkl_random")
    else:
        monkeypatch.setattr(normals, "_mkl_generator", lambda: None)


def test_what_was_drawn_ahead_is_added_once_times_std(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = marked(monkeypatch)
    noise.prepare(NUM, torch.float32, CPU)
    assert torch.equal(noise.add_(torch.ones(2, NUM // 2), 3.0), torch.full((2, NUM // 2), 1 + 3 * AHEAD))
    assert not bool((draw(noise) == AHEAD).any())
    assert bool((prepared(noise) == AHEAD).all())


def test_what_was_drawn_ahead_fills_once_times_std(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = marked(monkeypatch)
    noise.prepare(NUM, torch.float32, CPU)
    assert torch.equal(noise.fill_(torch.full((2, NUM // 2), torch.nan), 3.0), torch.full((2, NUM // 2), 3 * AHEAD))
    assert not bool((noise.fill_(torch.empty(NUM), 1.0) == AHEAD).any())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_and_shape_of_values_drawn_ahead(dtype: torch.dtype) -> None:
    """Chi-square, Kolmogorov-Smirnov and lags up to two chunks over 200,000 values; false-alarm rate 1e-6."""
    values = prepared(GaussianNoise(), NUM, 2.0, dtype).double()
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], df=NUM)
    assert low < (values / 2).square().sum().item() < high
    for wrong in (2 / 3, 3 / 2):
        assert not low < (values / 2 / wrong).square().sum().item() < high
    assert stats.kstest(values.numpy(), "norm", args=(0.0, 2.0)).pvalue > 1e-7
    for lag in (1, 2, CHUNK // 2, CHUNK, 2 * CHUNK):
        products = values[lag:] * values[:-lag] / 4
        assert abs(products.mean().item()) < 5.3 / math.sqrt(products.numel())


@pytest.mark.usefixtures("backend")
def test_no_value_comes_twice() -> None:
    """Ahead, ahead again, here, and ahead from another instance; two of 262,144 float64 values never meet by chance."""
    noise, num = GaussianNoise(), CHUNK
    draws = [
        *(prepared(noise, num, dtype=torch.float64) for _ in range(2)),
        draw(noise, num, dtype=torch.float64),
        prepared(GaussianNoise(), num, dtype=torch.float64),
    ]
    assert torch.cat(draws).unique().numel() == 4 * num


@pytest.mark.parametrize(
    ("num", "dtype"), [(NUM - 1, torch.float32), (NUM + 1, torch.float32), (10, torch.float32), (NUM, torch.float64)]
)
def test_what_does_not_fit_is_thrown_away(num: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = marked(monkeypatch)
    noise.prepare(NUM, torch.float32, CPU)
    for values in (draw(noise, num, dtype=dtype), draw(noise)):
        assert not bool((values == AHEAD).any())
    assert bool((prepared(noise) == AHEAD).all())


def test_another_call_replaces_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = marked(monkeypatch)
    noise.prepare(NUM, torch.float32, CPU)
    noise.prepare(NUM, torch.float64, CPU)
    assert not bool((draw(noise) == AHEAD).any())
    noise.prepare(NUM, torch.float32, CPU)
    assert bool((prepared(noise, NUM // 2) == AHEAD).all())


def test_the_same_call_again_draws_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    noise = marked(monkeypatch, lambda chunk, std: drawn.append(chunk.numel()))
    noise.prepare(NUM, torch.float32, CPU)
    prepared(noise)
    assert sum(drawn) == NUM


def test_values_are_spent_before_they_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = marked(monkeypatch)
    noise.prepare(NUM, torch.float32, CPU)

    def interrupted(*_: object, **__: object) -> Tensor:
        raise KeyboardInterrupt("while adding")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "add_", interrupted)
        with pytest.raises(KeyboardInterrupt, match="while adding"):
            draw(noise)
    assert not bool((draw(noise) == AHEAD).any())


def broken(chunk: Tensor, std: float) -> None:
    raise OSError("no more entropy")


@pytest.mark.parametrize("num", [NUM, 10])
def test_an_error_while_drawing_is_raised_by_the_next_add(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = marked(monkeypatch, broken)
    noise.prepare(NUM, torch.float32, CPU)
    tensor = torch.zeros(num)
    with pytest.raises(OSError, match="no more entropy"):
        noise.add_(tensor, 1.0)
    assert not bool(tensor.any())
    assert bool((draw(noise, num) != 0).all())


def test_an_error_while_drawing_what_is_not_wanted_is_raised_too(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = marked(monkeypatch, broken)
    noise.prepare(NUM, torch.float32, CPU)
    with pytest.raises(OSError, match="no more entropy"):
        noise.prepare(NUM + 1, torch.float32, CPU)


def test_drawing_goes_on_beside_and_add_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    threads: set[int] = set()

    def slow(chunk: Tensor, std: float) -> None:
        threads.add(threading.get_ident())
        assert go_on.wait(60)
        time.sleep(0.01)
        chunk.fill_(AHEAD)

    noise = marked(monkeypatch, slow)
    noise.prepare(NUM, torch.float32, CPU)  # returns although nothing can be drawn yet
    go_on.set()
    assert bool((draw(noise) == AHEAD).all())
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_the_thread_ends_with_its_generator() -> None:
    before = set(threading.enumerate())
    noise = GaussianNoise()
    prepared(noise)
    noise.prepare(NUM, torch.float32, CPU)
    (thread,) = set(threading.enumerate()) - before
    del noise
    thread.join(30)
    assert not thread.is_alive()


def test_a_draw_left_behind_does_not_write_into_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that was interrupted leaves its thread drawing: the next draw must have its own values only."""
    go_on, values = threading.Event(), iter([1.0, AHEAD])

    threads: set[int] = set()

    def slow(chunk: Tensor, std: float) -> None:
        threads.add(threading.get_ident())
        value = next(values)
        if value != AHEAD:
            assert go_on.wait(60)
        chunk.fill_(value)

    noise = marked(monkeypatch, slow)
    noise.prepare(CHUNK, torch.float32, CPU)
    assert noise._ahead is not None
    noise._ahead._drawn = None
    noise.prepare(CHUNK, torch.float32, CPU)
    go_on.set()
    time.sleep(0.1)  # for the first to write, were it still at it
    assert bool((draw(noise, CHUNK) == AHEAD).all())
    assert len(threads) == 1  # what keeps them apart


def test_the_buffer_is_reused_and_follows_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = marked(monkeypatch)
    sizes = []
    for num in (NUM, NUM, NUM // 2, NUM // 2 - 1, NUM):
        prepared(noise, num)
        assert noise._ahead is not None
        sizes.append(noise._ahead._buffer.numel())
    assert sizes == [NUM, NUM, NUM, NUM // 2 - 1, NUM]
    prepared(noise, NUM, dtype=torch.float64)
    assert noise._ahead is not None
    assert noise._ahead._buffer.dtype == torch.float64


@pytest.mark.parametrize(
    ("noise", "num", "device"),
    [
        (GaussianNoise(secure=True), NUM, "cpu"),
        (GaussianNoise(seed=1), NUM, "cpu"),
        (GaussianNoise(), (1 << 15) - 1, "cpu"),
        (GaussianNoise(), NUM, "meta"),
    ],
    ids=["secure", "seed", "few", "device"],
)
def test_does_nothing_where_it_would_not_help(noise: GaussianNoise, num: int, device: str) -> None:
    noise.prepare(num, torch.float32, torch.device(device))
    assert noise._ahead is None


@pytest.mark.usefixtures("backend")
def test_a_seed_gives_the_same_noise_with_and_without() -> None:
    assert torch.equal(prepared(GaussianNoise(seed=3)), draw(GaussianNoise(seed=3)))


def test_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype=torch\.bfloat16"):
        GaussianNoise().prepare(NUM, torch.bfloat16, CPU)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda noise: pickle.loads(pickle.dumps(noise))])
def test_copies_have_none_of_it(
    duplicate: Callable[[GaussianNoise], GaussianNoise], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        noise = marked(patch)
        noise.prepare(NUM, torch.float32, CPU)
    twin = duplicate(noise)
    assert not bool((draw(twin) == AHEAD).any())
    assert bool((draw(noise) == AHEAD).all())


def in_a_child(work: Callable[[], Tensor]) -> np.ndarray:
    """What a forked child computes (on one thread, as data workers do: torch's thread pool does not survive a fork)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            os.write(writer, work().numpy().tobytes())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        result = np.frombuffer(pipe.read(), np.float32)
    os.waitpid(child, 0)
    return result


@pytest.mark.usefixtures("backend")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("again", [False, True], ids=["add", "prepare and add"])
def test_a_forked_child_has_none_of_it(again: bool) -> None:
    """The parent uses what it drew; of 1000 float32 values of the child some 0.01 are among the first 1000 by
    chance.
    """
    noise = GaussianNoise()
    prepared(noise)
    noise.prepare(NUM, torch.float32, CPU)
    from_child = in_a_child(lambda: (prepared(noise, NUM // 2) if again else draw(noise))[:1000])
    assert from_child.size == 1000
    assert np.isin(from_child, draw(noise)[:1000].numpy()).sum() <= 5


FORKS_WHILE_DRAWING = """
import os, torch
from torch.utils.data import DataLoader, Dataset
from lightning_dp.noise import sources as normals
from lightning_dp.noise import GaussianNoise

def draw(num):
    noise.prepare(num, torch.float32, torch.device("cpu"))
    return noise.add_(torch.zeros(num), 1.0)

class Rows(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, row):
        return draw(1 << 15)

num = 1 << 20
for generator in (normals._mkl_generator, lambda: None):
    normals._mkl_generator = generator
    noise = GaussianNoise()
    for _ in range(15):
        noise.prepare(num, torch.float32, torch.device("cpu"))
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # torch's thread pool does not survive a fork
            os._exit(0 if 0.9 < draw(1 << 16).std() < 1.1 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert 0.9 < draw(num).std() < 1.1
    noise.prepare(num, torch.float32, torch.device("cpu"))
    rows = torch.cat(list(DataLoader(Rows(), num_workers=2)))
    assert rows.unique().numel() > 0.9 * rows.numel()
noise.prepare(8 * num, torch.float32, torch.device("cpu"))
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forks_while_drawing_do_not_hang() -> None:
    command = [sys.executable, "-c", FORKS_WHILE_DRAWING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_no_fork_begins_within_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that a generator holds at a fork would stay held in the child for ever."""
    drawing = threading.Event()

    def slow(chunk: Tensor, std: float) -> None:
        drawing.set()
        time.sleep(0.05)
        drawing.clear()

    noise = marked(monkeypatch, slow)
    noise.prepare(NUM, torch.float32, CPU)
    assert drawing.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(2 if drawing.is_set() else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    draw(noise)
