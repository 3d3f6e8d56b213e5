"""Noise on the CPU: how many threads draw it, that they end, and that it needs none of the process's tuning."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dp.noise import GaussianNoise, cpu
from lightning_dp.noise import sources as normals

CHUNK = 1 << 16


@pytest.fixture(params=["mkl", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "mkl":
        pytest.importorskip("mkl_random")
    else:
        monkeypatch.setattr(normals, "_mkl_generator", lambda: None)


@pytest.fixture
def threads_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have buffers of a few chunks drawn on several threads, whatever the machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(cpu, "_LEAST_PER_WAITING_THREAD", 1)
    monkeypatch.setattr(cpu, "end_waiting_threads", lambda: True)


def draw(noise: GaussianNoise, size: int = 64) -> torch.Tensor:
    return noise.add_(torch.zeros(size, dtype=torch.float64), 1.0)


@pytest.fixture
def ours() -> Callable[[], set[str]]:
    """Names of the threads that the test has started."""
    before = set(threading.enumerate())
    return lambda: {thread.name for thread in set(threading.enumerate()) - before}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("ends", [True, False])
def test_large_buffers_use_all_threads_once_none_waits(ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as on one thread; where the waiting ones do not end, two of MKL's take turns and one does."""
    asked: list[bool] = []
    monkeypatch.setattr(cpu, "end_waiting_threads", lambda: (asked.append(ends), ends)[1])
    monkeypatch.setattr(cpu, "_LEAST_PER_WAITING_THREAD", CHUNK)
    drew: set[int] = set()
    stream = normals.normal_stream

    def watched(seed: np.random.SeedSequence, *, tuned: bool) -> normals.Stream:
        fill = stream(seed, tuned=tuned)
        return lambda out, std: (drew.add(threading.get_ident()), fill(out, std))[1]

    monkeypatch.setattr(cpu, "normal_stream", watched)
    results, used = [], []
    for threads, size in ((1, 2 * CHUNK), (2, 2 * CHUNK), (2, 2 * CHUNK - 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        drew.clear()
        results.append(draw(GaussianNoise(seed=5), size))
        used.append(len(drew))
    assert torch.equal(results[0], results[1])
    alone = 1 if normals._mkl_generator() is not None else 2
    assert used == [1, 2 if ends else alone, alone]
    assert asked == [ends]


def test_what_a_thread_raises_is_raised_once_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "end_waiting_threads", lambda: True)
    monkeypatch.setattr(cpu, "_LEAST_PER_WAITING_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    caller, fails, ended = threading.get_ident(), True, []

    def stream(seed: np.random.SeedSequence, *, tuned: bool) -> normals.Stream:
        def fill(out: torch.Tensor, std: float) -> None:
            if threading.get_ident() == caller:
                if fails:
                    raise RuntimeError("of the caller")
                return
            time.sleep(0.05)
            ended.append(True)
            raise MemoryError("of the other")

        return fill

    monkeypatch.setattr(cpu, "normal_stream", stream)
    with pytest.raises(RuntimeError, match="of the caller"):
        GaussianNoise().fill_(torch.zeros(4 * CHUNK), 1.0)
    assert ended  # and so it will not write any more
    fails = False
    with pytest.raises(MemoryError, match="of the other"):
        GaussianNoise().fill_(torch.zeros(4 * CHUNK), 1.0)


@pytest.mark.usefixtures("threads_pay")
def test_close_ends_every_thread_and_noise_goes_on(ours: Callable[[], set[str]]) -> None:
    noise = GaussianNoise()
    drawn = draw(noise, 4 * CHUNK)
    assert {name.rpartition("_")[0] for name in ours()} == {"noise"}
    noise.close()
    noise.close()
    assert not ours()
    again = draw(noise, 4 * CHUNK)
    assert torch.cat([drawn, again]).unique().numel() == 8 * CHUNK
    assert ours()
    noise.close()


@pytest.mark.usefixtures("threads_pay")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_may_close_its_copy(ours: Callable[[], set[str]]) -> None:
    noise = GaussianNoise()
    draw(noise, 4 * CHUNK)
    before = ours()
    child = os.fork()
    if child == 0:
        noise.close()
        torch.set_num_threads(1)
        os._exit(17 if draw(noise).unique().numel() == 64 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert ours() == before
    noise.close()


@pytest.mark.usefixtures("threads_pay")
def test_untuned_noise_starts_no_thread_and_ends_none(
    ours: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "end_waiting_threads", lambda: pytest.fail("threads of OpenMP were ended"))
    monkeypatch.setattr(normals, "_torch_stream", lambda seed: pytest.fail("a state was written by hand"))
    monkeypatch.setattr(normals, "_mkl_generator", lambda: None)
    noise = GaussianNoise(tuned=False)
    values = draw(noise, 4 * CHUNK)
    assert not ours()
    low, high = stats.chi2.ppf([1e-8, 1 - 1e-8], df=values.numel())
    assert low < float(values.square().sum()) < high
    for wrong in (2 / 3, 3 / 2):
        assert not low < float((values / wrong).square().sum()) < high
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-7
    assert torch.equal(draw(GaussianNoise(seed=3, tuned=False)), draw(GaussianNoise(seed=3, tuned=False)))
    assert not pickle.loads(pickle.dumps(noise)).tuned
