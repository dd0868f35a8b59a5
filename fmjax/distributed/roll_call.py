"""Names missing hosts at start-up in one line, where JAX's coordination service would end the
process.

The first host listens at the port of the coordination service until all others have sent their
index; then it answers all of them and frees the port.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

from fmjax.config.numbers import is_count
from fmjax.errors import UserError

ALL, ABSENT, TWICE = "all", "absent", "twice"
PAUSE = 0.2  # seconds between attempts to reach the first host


def roll_call(coordinator: str, count: int, index: int, timeout: float) -> None:
    """Returns when all hosts are present.

    Args:
      coordinator: HOST:PORT of the first host.
      count: the number of hosts.
      index: this host's index.
      timeout: seconds to wait for the others.

    Raises UserError on every present host, naming the missing hosts; or the address, if it is
    malformed, in use, or does not answer; or an index that two hosts share.
    """
    name, _, port = coordinator.rpartition(":")
    if not name or not is_count(port) or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator={coordinator}: is not HOST:PORT, such as 10.0.0.1:8476; correct it"
        )
    deadline = time.monotonic() + timeout
    if count == 1:
        return
    if index == 0:
        answer = gather(coordinator, int(port), count, deadline)
    else:
        answer = ask(coordinator, (name.strip("[]"), int(port)), index, deadline, timeout)
    kind, _, numbers = answer.partition(" ")
    if kind == ABSENT:
        raise UserError(
            f"host {numbers} of {count} did not join within {timeout:g} s; "
            "start the same command on every host, with --host=0 "
            f"to {count - 1}, and check that they can reach {coordinator}"
        )
    if kind == TWICE:
        raise UserError(
            f"--host={numbers}: two hosts have this index; give each of the {count} hosts its own"
        )


def gather(coordinator: str, port: int, count: int, deadline: float) -> str:
    """Waits on the first host for the indices of the others. Returns the answer that it sent
    them."""
    present: dict[int, socket.socket] = {}
    answer = ALL
    with contextlib.ExitStack() as callers:
        with listening(coordinator, port) as listener:
            while len(present) < count - 1 and answer == ALL:
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    caller = callers.enter_context(listener.accept()[0])
                except TimeoutError:
                    absent = [str(number) for number in range(1, count) if number not in present]
                    answer = f"{ABSENT} {', '.join(absent)}"
                    break
                number = read_number(caller, deadline)
                if number is None or number >= count:
                    continue  # not a host of this run
                if number in present or number == 0:
                    answer = f"{TWICE} {number}"
                    with contextlib.suppress(OSError):
                        caller.sendall(f"{answer}\n".encode())
                present.setdefault(number, caller)
        # The port is free now: hosts that learn that all are present find the coordination service,
        # or try again.
        for caller in present.values():
            with contextlib.suppress(OSError):
                caller.sendall(f"{answer}\n".encode())
    return answer


@contextlib.contextmanager
def listening(coordinator: str, port: int) -> Iterator[socket.socket]:
    """Yields a socket that listens at a port of this host. Raises UserError if it is in use."""
    try:
        listener = socket.create_server(("", port), backlog=128)
    except OSError as error:
        raise UserError(
            f"--coordinator={coordinator}: this host cannot listen there ({error.strerror}); "
            "choose a free port"
        ) from None
    with listener:
        yield listener


def read_number(caller: socket.socket, deadline: float) -> int | None:
    """Returns the index that a caller reports; None if it is not a host of this run."""
    caller.settimeout(max(min(deadline - time.monotonic(), 5.0), 0.001))
    try:
        said = caller.makefile("rb").readline(32).strip()
    except OSError:
        return None
    return int(said) if said.isdigit() else None  # bytes: the digits of ASCII


def ask(
    coordinator: str, address: tuple[str, int], index: int, deadline: float, timeout: float
) -> str:
    """Sends this host's index to the first host, and returns its answer."""
    reason = "timed out"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=left) as line:
                line.sendall(f"{index}\n".encode())
                # The first host's timeout may have started after ours; then it answers late.
                line.settimeout(left + timeout)
                if answer := line.makefile("rb").readline(4096).decode("ascii", "replace").strip():
                    return answer
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(PAUSE)
    raise UserError(
        f"the first host did not answer at {coordinator} within {timeout:g} s ({reason}); "
        "start the same command on it with "
        "--host=0, and check that this host can reach it"
    )
