"""Work shared by processes: in order, the same with any number, and a killed worker is said."""

import math
import os

import pytest

from dlpo_nb.core import UserError
from dlpo_nb.workers import mapped


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers):
    with mapped(math.factorial, [5, 1, 4, 0], workers) as results:
        assert list(results) == [120, 1, 24, 1]


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(UserError, match="fewer --workers"), mapped(os._exit, [1, 1], 2) as results:
        list(results)
