"""What the TPU's compiler needs for a loss over a large vocabulary, whole and in chunks; no TPU is touched.

The figures are those of fmjax/bench/README.md: pytest -m full -s tests/planning/test_compiled_memory.py, with libtpu.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmjax.errors import UserError
from fmjax.layers.vocabulary import VocabularyLogits, cross_entropy_sum
from fmjax.planning.topology import read_topology

pytestmark = [pytest.mark.optimized, pytest.mark.full]
ROWS, WIDTH, CLASSES = 8192, 768, 32000


@pytest.fixture(scope="module")
def device() -> Any:
    try:
        return read_topology("v5e:2x2").devices()[0]
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("rows", "most"), [(0, 1001), (1024, 130)])
def test_temporaries_of_a_loss(device, rows, most):
    whole = NamedSharding(Mesh(np.array([device]), ("one",)), PartitionSpec())

    def abstract(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def loss(hidden: jax.Array, table: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
        logits = VocabularyLogits(hidden, table, None, rows, ("act_batch",))
        if not rows:
            logits = jnp.dot(hidden, table.astype(hidden.dtype).T, preferred_element_type=jnp.float32)
        return cross_entropy_sum(logits, labels, weights)

    arrays = abstract(ROWS, WIDTH, dtype=jnp.bfloat16), abstract(CLASSES, WIDTH)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    program = step.lower(*arrays, abstract(ROWS, dtype=jnp.int32), abstract(ROWS)).compile()
    found = program.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{rows or ROWS} rows at once: {found:.0f} MiB of temporaries")
    assert found <= most and found >= most / 2
