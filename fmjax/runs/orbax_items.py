"""A step's items, trees of arrays, as Orbax writes and reads them (https://orbax.readthedocs.io).

Orbax is imported here alone, and set up for our use: quiet, patient with slow disks, and quick with
small arrays.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import closing, suppress

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from jax.sharding import SingleDeviceSharding

from fmjax.contracts import PyTree
from fmjax.filesystems.paths import RunPath
from fmjax.filesystems.patience import OUTAGE
from fmjax.pytree import names, unnames
from fmjax.runs.manifest import flat

# Orbax gives up a save after this time, by default ten minutes; a slow disk is no error.
LONGEST_SAVE = 6 * 3600
# Below these bytes a copy of an array is written by one device: cutting it up for all that have it
# compiles a program for each shape and device, which on eight devices took longer than all the rest
# of a small model's first save.
LEAST_SLICE = 2**20
# Tries of a request of TensorStore, whose pauses add up to `patience.PATIENCE`: by default it tries
# 32 times, for a quarter of an hour.
TRIES = {"max_retries": 10, "initial_delay": "1s", "max_delay": "32s"}


def quiet_orbax() -> None:
    """Leaves a failed save to the one line of our UserError; what else fails or speaks in the
    process is still heard.

    Orbax logs each error that it also raises, through the logger that Grain and TFDS share. It
    leaves the other writes of that save to themselves: some fail unheard, some were never begun,
    some report to an event loop that it has closed.
    """
    logging.getLogger("absl").addFilter(
        lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname
    )
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    usual = sys.unraisablehook

    def hook(unraisable: PyTree) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    sys.unraisablehook = hook


def limit_tries() -> None:
    """Sets how often TensorStore repeats a request, for which Orbax has no setting."""
    with suppress(ImportError):  # a private module: without it, TensorStore is more patient
        from orbax.checkpoint._src.serialization import tensorstore_utils

        for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):
            vars(tensorstore_utils).get(name, {})["gcs_request_retries"] = TRIES


quiet_orbax()
limit_tries()
ocp.type_handlers.register_type_handler(
    jax.Array,
    ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_SLICE),
    override=True,
)


def restore(folder: RunPath, abstract: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns items of a step's folder, each in the structure and with the shardings of its
    abstract tree.

    A leaf without a sharding comes on the first device of each host.
    """
    targets = {
        item: unnames({name: placed(leaf) for name, leaf in flat(tree).items()})
        for item, tree in abstract.items()
    }
    wanted = {item: ocp.args.StandardRestore(target) for item, target in targets.items() if target}
    with closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as orbax:
        restored = (
            orbax.restore(epath.Path(folder), args=ocp.args.Composite(**wanted)) if wanted else {}
        )
    items = {}
    for item, tree in abstract.items():
        found = names(restored[item]) if item in wanted else {}
        items[item] = jax.tree.unflatten(
            jax.tree.structure(tree), [found[name] for name in flat(tree)]
        )
    return items


def writer() -> ocp.AsyncCheckpointer:
    """Returns what writes steps behind the training, one at a time."""
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=LONGEST_SAVE)


def start(
    orbax: ocp.AsyncCheckpointer, folder: RunPath, items: Mapping[str, Mapping[str, PyTree]]
) -> None:
    """Starts writing a step's items, each its leaves by name, to a new folder.

    On return, arrays may be donated. Raises OSError or ValueError if it cannot be started.
    """
    # Orbax refuses an item without arrays, such as the state of plain SGD: the manifest alone
    # remembers it.
    arguments = {
        item: ocp.args.StandardSave(unnames(owned(leaves)))
        for item, leaves in items.items()
        if leaves
    }
    orbax.save(epath.Path(folder), args=ocp.args.Composite(**arguments))


def repeated_requests() -> int:
    """Returns how many requests to buckets this process has repeated: ours, and those of Orbax."""
    theirs = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/gcs/retries")
    values = [value["value"] for metric in theirs for value in metric["values"]]
    return OUTAGE.repeated + int(sum(values))


def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the abstract leaf with a sharding: Orbax would take the stored one, whose devices may
    not be here.
    """
    return jax.ShapeDtypeStruct(
        leaf.shape,
        leaf.dtype,
        sharding=leaf.sharding or SingleDeviceSharding(jax.local_devices()[0]),
    )


def owned(leaves: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns arrays whose host memory is ours while Orbax writes it.

    From an accelerator Orbax copies to the host before its `save` returns. On CPU that is a view of
    the very buffer that the next step is given to overwrite, and only the runtime's reluctance to
    donate a viewed buffer would protect it.
    """

    def own(leaf: PyTree) -> PyTree:
        on_host = isinstance(leaf, jax.Array) and all(
            device.platform == "cpu" for device in leaf.devices()
        )
        return jax.device_put(leaf, leaf.sharding, may_alias=False) if on_host else leaf

    return {name: own(leaf) for name, leaf in leaves.items()}
