"""Signals are noted in the block alone, and a second one ends the process."""

from __future__ import annotations

import os
import signal

import pytest

from fmjax.train.signals import Signals, interruption


def test_a_signal_is_noted_and_a_second_one_ends_the_process():
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    with signals.noted():
        assert signals.agreed(3, waiting=False) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.caught == signals.agreed(3, waiting=False) == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert signal.getsignal(signal.SIGTERM) is before
    assert (
        str(interruption(signal.SIGTERM, 3))
        == "SIGTERM: saved step 3; run the same command again to continue"
    )


def test_several_hosts_compare_where_they_wait(monkeypatch):
    asked = []
    monkeypatch.setattr("fmjax.train.signals.hosts.several", lambda: True)
    monkeypatch.setattr(
        "fmjax.train.signals.hosts.any_of", lambda number: asked.append(number) or 15
    )
    signals = Signals()
    assert signals.agreed(3, waiting=False) == 0 and not asked
    assert (
        signals.agreed(3, waiting=True) == signals.agreed(10, waiting=False) == 15
        and len(asked) == 2
    )
