"""What a run asks of its machine."""

import torch

from embodied_rl import host


def test_a_run_takes_numbers_next_to_nothing_for_nothing():
    tiny = torch.full((64,), 1e-39)
    assert float((tiny * 1.0).sum()) > 0
    threads = torch.get_num_threads()
    host.prepare(threads)
    assert float((tiny * 1.0).sum()) == 0 and torch.get_num_threads() == threads
    assert float(torch.full((64,), 1e-37).sum()) > 0
