"""Each computing thread gets a CPU of its own, and a busy machine is noticed."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch

from vqvae2.common import threads
from vqvae2.common.threads import OwnCpus, fastest_number, set_threads

CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
several = pytest.mark.skipif(len(CPUS) < 2, reason="there is one CPU, or no way to bind to it")


@pytest.fixture
def one_thread_per_cpu():
    set_threads(len(CPUS))
    yield
    set_threads(0)


BOUND = """
import os
from vqvae2.common.threads import OwnCpus, set_threads

cpus = os.sched_getaffinity(0)
set_threads(len(cpus))
own_cpus = OwnCpus()
assert len(own_cpus.threads) == len(cpus)
with own_cpus:
    bound = [os.sched_getaffinity(thread) for thread in own_cpus.threads]
assert set().union(*bound) == cpus
assert [len(each) for each in bound] == [1] * len(cpus)
assert all(os.sched_getaffinity(thread) == cpus for thread in own_cpus.threads)
"""


@several
def test_computing_threads_have_a_cpu_each_during_a_step_and_all_after_it():
    """In a process of its own: here, other tests have started threads."""
    subprocess.run([sys.executable, "-c", BOUND], check=True)


@several
@pytest.mark.parametrize("reason", ["fewer threads", "another process", "not the main thread"])
def test_threads_are_not_bound_where_the_scheduler_does_better(
    reason, one_thread_per_cpu, monkeypatch
):
    made = []
    if reason == "fewer threads":
        set_threads(1)
    if reason == "another process":
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if reason == "not the main thread":
        worker = threading.Thread(target=lambda: made.append(OwnCpus()))
        worker.start()
        worker.join()
    assert (made or [OwnCpus()])[0].threads == []


@pytest.mark.parametrize(
    ("waited", "on_cpu", "said"), [(0.6, True, [1]), (0.6, False, [0]), (0.1, True, [])]
)
def test_a_run_says_once_that_other_processes_keep_the_cpus_busy(
    waited, on_cpu, said, monkeypatch, caplog
):
    """And what to do, unless a GPU computes: its program needs no threads."""
    now = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(threads, "_waited", lambda: waited * now[0])
    own_cpus = OwnCpus(bind=on_cpu)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 2)
    with caplog.at_level(logging.WARNING):
        for now[0] in (5.0, 20.0, 40.0):
            own_cpus.warn()
    assert [record.message.count("num_threads 1") for record in caplog.records] == said


@pytest.mark.parametrize(("seconds", "number"), [({2: 1, 1: 0.9}, 0), ({2: 1, 1: 0.2}, 1)])
def test_one_thread_is_chosen_if_it_is_clearly_faster(seconds, number):
    torch.set_num_threads(2)
    try:
        assert fastest_number(lambda: seconds[torch.get_num_threads()]) == number
        assert torch.get_num_threads() == (number or 2)
    finally:
        set_threads(0)
        torch.set_num_threads(1)


@several
def test_a_thread_that_has_ended_is_no_error(one_thread_per_cpu):
    own_cpus = OwnCpus()
    own_cpus.threads[-1] = 2**22 - 1
    with own_cpus:
        assert os.sched_getaffinity(0) != CPUS
    assert os.sched_getaffinity(0) == CPUS
