"""If one host ends with an error, all end."""

from __future__ import annotations

import atexit
import itertools
import threading

import jax
import pytest

from fmjax.distributed import alarm, hosts
from fmjax.errors import Interrupted, UserError


class Store:
    """The key-value store of JAX's coordination service."""

    def __init__(self):
        self.lines: dict[str, str] = {}

    def key_value_set(self, key, value):
        self.lines[key] = value

    def key_value_dir_get(self, place):
        return [(key, value) for key, value in self.lines.items() if key.startswith(place)]


class Ended(Exception):
    pass


@pytest.fixture
def store(monkeypatch):
    """This process is the first of two hosts."""
    made = Store()
    monkeypatch.setattr(alarm, "service", lambda: made)
    monkeypatch.setattr(alarm, "LOOK", 0.01)
    monkeypatch.setattr(alarm, "blocks", itertools.count(1))
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    return made


def test_a_host_ends_with_another(store, monkeypatch, capsys):
    left, cleaned, codes = threading.Event(), [], []

    def leave(place, code):
        codes.append(code)
        left.set()

    monkeypatch.setattr(alarm, "depart", leave)
    with alarm.ending_together(lambda: cleaned.append(1)):
        store.lines["fmjax/ended/1/1"] = "host 1 has ended: the bucket is gone"
        assert left.wait(30)
    assert codes == [2] and cleaned == [1] and store.lines["fmjax/ended/1/0"] == ""
    assert capsys.readouterr().err == "error: host 1 has ended: the bucket is gone; all hosts end\n"


@pytest.mark.parametrize(("error", "code"), [(UserError("no\nspace"), 2), (ValueError("bug"), 1), (KeyboardInterrupt(), 1)])
def test_a_host_tells_the_others(error, code, store, monkeypatch):
    registered = []
    monkeypatch.setattr(atexit, "register", lambda *words: registered.append(words))
    with pytest.raises(type(error)), alarm.ending_together(lambda: None):
        raise error
    said = " ".join(str(error).split()) or "KeyboardInterrupt"
    assert store.lines == {"fmjax/ended/1/0": f"host 0 has ended: {said}"}
    assert registered == [(alarm.depart, "fmjax/ended/1/", code)]


def test_an_error_that_was_caught_ends_no_later_block(store, monkeypatch):
    registered, looked = [], threading.Event()
    monkeypatch.setattr(atexit, "register", lambda *words: registered.append(words))
    monkeypatch.setattr(atexit, "unregister", lambda call: registered.clear())
    monkeypatch.setattr(alarm, "depart", lambda place, code: pytest.fail("ended"))
    for _ in range(2):
        with pytest.raises(UserError), alarm.ending_together(lambda: None):
            raise UserError("no space")
    assert sorted(store.lines) == ["fmjax/ended/1/0", "fmjax/ended/2/0"] and len(registered) == 1
    monkeypatch.setattr(store, "key_value_dir_get", lambda place: looked.set() or Store.key_value_dir_get(store, place))
    with alarm.ending_together(lambda: None):
        assert looked.wait(30)
    assert registered == []


def test_an_agreed_end_and_a_single_host_are_left_alone(store, monkeypatch):
    with pytest.raises(Interrupted), alarm.ending_together(lambda: None):
        raise Interrupted("SIGTERM")
    monkeypatch.setattr(hosts, "several", lambda: False)
    with pytest.raises(UserError), alarm.ending_together(lambda: None):
        raise UserError("no")
    assert store.lines == {}
