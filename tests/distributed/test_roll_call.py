"""The roll call of hosts: who is missing, or there twice, is named on every host."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fmjax.distributed import hosts
from fmjax.distributed.roll_call import roll_call
from fmjax.errors import UserError


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def call(numbers, count, timeout):
    """Returns what the roll call says to each of the hosts that are there: "" if all came."""
    address = f"localhost:{free_port()}"

    def one(number):
        try:
            roll_call(address, count, number, timeout)
        except UserError as error:
            return str(error).replace(address, "ADDRESS")
        return ""

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers)), address


def test_all_come_in_any_order_and_the_port_is_free_again():
    said, address = call([3, 1, 0, 2], 4, 20)
    assert said == [""] * 4
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        pass


def test_every_host_that_is_there_names_those_that_are_not():
    said, _ = call([0, 2], 4, 3)
    message = (
        "host 1, 3 of 4 did not join within 3 s; start the same command on every host, with --host=0 to 3, and check that they "
        "can reach ADDRESS"
    )
    assert said == [message] * 2


def test_a_number_that_two_hosts_have():
    said, _ = call([0, 1, 1], 3, 20)
    assert said == ["--host=1: two hosts have this index; give each of the 3 hosts its own"] * 3


def test_the_first_host_is_missing():
    (said,), _ = call([1], 2, 0.5)
    assert said == (
        "the first host did not answer at ADDRESS within 0.5 s (Connection refused); start the same command on it with --host=0, "
        "and check that this host can reach it"
    )


def test_who_is_no_host_of_ours_is_not_counted():
    address = ("localhost", free_port())
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(roll_call, f"localhost:{address[1]}", 2, 0, 20)
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"7\n"):
            for _ in range(1000):
                try:
                    with socket.create_connection(address) as stranger:
                        stranger.sendall(words)
                    break
                except OSError:
                    time.sleep(0.05)
        assert not first.done()
        pool.submit(roll_call, f"localhost:{address[1]}", 2, 1, 20).result()
        first.result()


def test_a_port_that_is_in_use():
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(UserError, match="cannot listen there .*choose a free port"),
    ):
        roll_call(f"localhost:{taken.getsockname()[1]}", 2, 0, 1)


@pytest.mark.parametrize("address", ["localhost", ":8476", "localhost:port", "localhost:0", "localhost:70000"])
def test_an_address_that_is_none(address):
    with pytest.raises(UserError, match="is not HOST:PORT"):
        roll_call(address, 2, 0, 1)


def test_a_host_alone_needs_nobody():
    roll_call("localhost:1", 1, 0, 0)


def test_joining_begins_with_the_roll_call():
    with pytest.raises(UserError, match="host 1 of 2 did not join within 1 s"):
        hosts.join(f"localhost:{free_port()}", 2, 0, 1)
