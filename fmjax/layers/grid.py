"""Positions on a grid of patches: two-dimensional sinusoids, and interpolation to another grid
size.

Dimensions: B batch, N positions, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def sinusoids_2d(side: int, width: int) -> np.ndarray:
    """Returns fp32 [side * side, D]: sines and cosines of the column in the first half of each row,
    then those of the row.

    The frequencies are 10000^(-4k/D) for k < D/4; D must be a multiple of 4. The order is that of
    MAE's published weights (He et al. 2022, arXiv:2111.06377).
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * frequencies[None]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(line, (side, 1)), np.repeat(line, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


def bicubic(old: int, new: int) -> np.ndarray:
    """Returns fp32 [new, old]: the matrix that resamples a row of `old` values at the centers of
    `new` cells.

    Keys' cubic convolution with a = -0.75 and repeated ends, without antialiasing, like
    torch.nn.functional.interpolate(mode="bicubic", align_corners=False).
    """
    a = -0.75
    center = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(center).astype(int) - 1
    matrix = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(center - (first + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * a * x - 4 * a
        np.add.at(
            matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far)
        )
    return matrix.astype(np.float32)


def resized(table_1ND: jax.Array, before: int, grid: tuple[int, int]) -> jax.Array:
    """Returns a position table for a grid of another height and width: [1, before + height * width,
    D].

    In the table [1,N,D], the first `before` positions belong to no patch, and the others form a
    square grid. For the same grid, the table is unchanged.
    """
    count, width = table_1ND.shape[1:]
    side = round((count - before) ** 0.5)
    if grid == (side, side):
        return table_1ND
    down, across = (jnp.asarray(bicubic(side, size)) for size in grid)
    patches = table_1ND[0, before:].reshape(side, side, width)
    patches = jnp.einsum(
        "hi,wj,ijd->hwd", down, across, patches.astype(jnp.float32), precision="highest"
    )
    return jnp.concatenate(
        [table_1ND[:, :before], patches.reshape(1, -1, width).astype(table_1ND.dtype)], axis=1
    )


def bicubic_each(old: int, new_B: jax.Array, size: int) -> jax.Array:
    """Returns fp32 [B, size, old]: for each number of cells in `new`, the matrix of `bicubic` for
    the first of `size` cells.

    Further rows have no meaning.
    """
    a = -0.75
    ratio_B = old / jnp.maximum(new_B, 1).astype(jnp.float32)
    center = (jnp.arange(size, dtype=jnp.float32)[None] + 0.5) * ratio_B[:, None] - 0.5
    first = jnp.floor(center) - 1
    matrix = jnp.zeros((*center.shape, old), jnp.float32)
    for tap in range(4):
        x = jnp.abs(center - (first + tap))
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * a * x - 4 * a
        place = jnp.clip(first + tap, 0, old - 1).astype(jnp.int32)
        matrix += jax.nn.one_hot(place, old) * jnp.where(x <= 1, near, far)[..., None]
    return matrix


def resized_each(table_1ND: jax.Array, before: int, mask_BHW: jax.Array) -> jax.Array:
    """Returns the positions [B, H * W, D] of patches for images of different sizes on canvases of H
    x W patches.

    `mask` (bool) marks each image's patches, which are the top left part of its canvas; the other
    positions have no meaning. The table is as in `resized`.
    """
    rows, height, width = mask_BHW.shape
    side = round((table_1ND.shape[1] - before) ** 0.5)
    down = bicubic_each(side, mask_BHW.any(axis=2).sum(axis=1), height)
    across = bicubic_each(side, mask_BHW.any(axis=1).sum(axis=1), width)
    patches = table_1ND[0, before:].reshape(side, side, -1).astype(jnp.float32)
    places = jnp.einsum("bhi,bwj,ijd->bhwd", down, across, patches, precision="highest")
    return places.reshape(rows, height * width, -1).astype(table_1ND.dtype)
