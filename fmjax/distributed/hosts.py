"""Runs on several hosts: how they find each other, what each of them reads, and what the first one
does for all.

Every host runs the same program on the same run directory. Each reads the batch rows of its own
devices. All compute the same results, so decisions based on metrics agree; only the first host
writes.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from rich.console import Console

from fmjax.config.commandline import Flags
from fmjax.contracts import HostBatch, PyTree
from fmjax.distributed.roll_call import roll_call
from fmjax.errors import UserError, one_line


def join(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins the other hosts. Without a coordinator, finds them automatically on a TPU VM, under
    Slurm or Open MPI.

    Args:
      coordinator: HOST:PORT of the first host, if the cluster does not provide it.
      count: the number of hosts.
      index: this host's index; 0 is the coordinator.
      timeout: seconds to wait for the others.

    Raises UserError if the arguments do not fit together, and after `timeout` seconds, naming
    missing hosts. In a cluster, JAX names the hosts, and its coordination service may end the
    process itself.
    """
    given = {"--coordinator": coordinator, "--hosts": count, "--host": index}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(
            f"{', '.join(missing)}: missing; give --coordinator, --hosts and --host together, or "
            "none of them"
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise UserError(
            f"--host={index}: hosts are numbered from 0 to {count - 1}; --hosts={count}"
        )
    if coordinator is not None and count is not None and index is not None:
        roll_call(coordinator, count, index, timeout)
    try:
        jax.distributed.initialize(coordinator, count, index, initialization_timeout=timeout)
    except ValueError as error:
        raise UserError(
            f"--distributed: no cluster was found ({one_line(error, 100)}); "
            "give --coordinator=HOST:PORT --hosts=N --host=I"
        ) from None
    except Exception as error:
        if "DEADLINE_EXCEEDED" not in str(error) and "UNAVAILABLE" not in str(error):
            raise
        absent = sorted(
            {
                int(number)
                for number in re.findall(
                    r"/task:(\d+)", str(error).partition("timed out task names")[2]
                )
            }
        )
        named = (
            f"host {', '.join(map(str, absent))}" if absent else f"the coordinator {coordinator}"
        )
        raise UserError(
            f"{named} did not join within {timeout} s; "
            "start the same command on every host, and check that they can reach each other"
        ) from None
    # CPUs connect at their first collective, for which Gloo waits half a minute. Do it now, before
    # a host takes longer than that to prepare.
    meet("joined")


def add_flags(flags: Flags) -> None:
    """Adds the flags for running on several hosts; `join_if_asked` reads them."""
    flags.add(
        "--distributed",
        action="store_true",
        help="run on several hosts (found automatically on a TPU VM, under Slurm or Open MPI)",
    )
    flags.add(
        "--coordinator",
        metavar="HOST:PORT",
        help="elsewhere: address of the first host with a free port; needs --hosts and --host",
    )
    flags.add("--hosts", type=int, metavar="N", help="the number of hosts")
    flags.add("--host", type=int, metavar="I", help="the index of this host, from 0")
    flags.add(
        "--join-timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long to wait for the other hosts (default: 300)",
    )


def join_if_asked(args: Namespace) -> None:
    """Joins the other hosts if the flags request it.

    Raises UserError like `join`.
    """
    given = (args.coordinator, args.hosts, args.host)
    if args.distributed or any(value is not None for value in given):
        join(*given, timeout=args.join_timeout)


def several() -> bool:
    # JAX must not initialize its devices before this.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the host that writes."""
    return not several() or jax.process_index() == 0


def meet(place: str) -> None:
    """Returns when all hosts have reached `place`."""
    if several():
        multihost_utils.sync_global_devices(place)


def any_of(number: int) -> int:
    """Returns the maximum of `number` over all hosts."""
    return int(multihost_utils.process_allgather(np.int32(number)).max()) if several() else number


def of_first(number: int) -> int:
    """Returns the first host's number."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if several() else number


def gather(arrays: PyTree) -> PyTree:
    """Returns global arrays, of which each host has a part, complete on every host."""
    return (
        multihost_utils.process_allgather(arrays, tiled=True)
        if several()
        else jax.device_get(arrays)
    )


def join_rows(arrays: PyTree) -> PyTree:
    """Returns the rows from all hosts, complete on every host, in the order of the hosts."""
    parts = multihost_utils.process_allgather(arrays)
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), parts)


def rows_of(sharding: NamedSharding, size: int) -> np.ndarray | None:
    """Returns the rows of a batch of `size` on this host's devices, in order; None for all."""
    if not several():
        return None
    held = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(
        np.concatenate([np.arange(size)[index] for index in held if index is not None])
    )


def place(
    batch: HostBatch, shardings: Mapping[str, NamedSharding], size: int
) -> dict[str, jax.Array]:
    """Puts this host's rows of a batch of `size` on its devices."""
    return {
        name: jax.make_array_from_process_local_data(
            shardings[name], np.asarray(array), (size, *array.shape[1:])
        )
        for name, array in batch.items()
    }


def check_same(facts: Mapping[str, str]) -> None:
    """Raises UserError, naming what differs, unless all hosts have the same facts (SHA-256 in
    hexadecimal)."""
    if not several():
        return
    ours = np.array(
        [[int(digest[at : at + 2], 16) for at in range(0, 32, 2)] for digest in facts.values()],
        np.int32,
    )
    theirs = multihost_utils.process_allgather(ours).reshape(jax.process_count(), *ours.shape)
    for number, name in enumerate(facts):
        other = np.flatnonzero((theirs[:, number] != theirs[0, number]).any(axis=-1))
        if other.size:
            raise UserError(
                f"{name} on host {other[0]} differs from that of host 0; every host must read the "
                "same files"
            )


def say(text: str) -> None:
    """Prints a line on stderr, since stdout is for results. Only the first host prints."""
    if not first():
        return
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def console() -> Console:
    return Console(stderr=True)
