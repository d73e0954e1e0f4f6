"""However often and wherever a run is killed, it ends as the one that was left alone, bit for bit."""

import os
import random
from pathlib import Path

import pytest
from faults.killing import Study, kill, kills_of, summary
from fuzz.oracle import DEEP

KILLS = int(os.environ.get("COSA_FAST_DEEP_KILLS", "200")) if DEEP else 10


def test_killed_runs_end_as_the_undisturbed_one(study: Study) -> None:
    found = summary(kills_of(study, KILLS, random.Random(None if DEEP else 2)))
    assert found["kills"] == KILLS
    assert not found["problems"], found


@pytest.mark.skipif(not DEEP, reason="make test-slow")
def test_killed_ranks_do_too(tmp_path: Path) -> None:
    found = summary(kill(KILLS // 5, random.randrange(2**32), tmp_path, ranks=2))
    assert not found["problems"], found
