"""What is lost where a bucket rejects further writes; the rescue itself is in scripts/test_bucket_runs.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fmjax.distributed import hosts
from fmjax.errors import UserError
from fmjax.filesystems.buckets import BucketPath
from fmjax.runs.checkpoint import NotSaved
from fmjax.train.rescue import rescuing


@pytest.mark.parametrize("error", [NotSaved("gs://b/run/8: rejected"), OSError(5, "rejected", "gs://b/run/8")])
def test_several_hosts_say_what_is_lost(error, monkeypatch):
    monkeypatch.setattr(hosts, "several", lambda: True)
    abandoned = []
    running = SimpleNamespace(
        experiment=SimpleNamespace(workdir=BucketPath("b", "run")),
        saver=SimpleNamespace(wait=lambda: None),
        recorder=SimpleNamespace(abandon=lambda: abandoned.append(1)),
    )
    said = "^gs://b/run/8: rejected.*; the steps since the newest checkpoint are lost, as no host has the whole state$"
    with pytest.raises(UserError, match=said), rescuing(running, {}):
        raise error
    assert abandoned == [1]  # an upload at the end would fail as well
