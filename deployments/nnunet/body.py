"""Where the body is in a CT, and which tiles hold nothing of it.

What lies outside the body is background *by definition*, not by a network. So a tile that no voxel of the body depends on need
not be computed; every other tile is, and so labels inside the body are the same bits as without this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deployments.nnunet.resampling import Cells

#: A block without a voxel above this is air, of a scanner's noise too. The lung's vessels and walls are above it, mostly.
AIR_HU = -800
#: How far the body is grown: over what noise, clothes and open mouths cut off.
MARGIN_MM = 20.0
#: Side of the blocks that are either body or not.
_BLOCK_MM = 4.0


class Blocks(NamedTuple):
    """A mask of blocks of voxels.

    Parameters
    ----------
    inside : ndarray of bool, shape (bz, by, bx)
        Whether a block belongs to it.
    size : (z, y, x)
        Voxels of a block along each axis; the last block of an axis may be cut.
    """

    inside: NDArray[np.bool_]
    size: tuple[int, int, int]

    def transposed(self, axes: Sequence[int]) -> Blocks:
        """Return the mask of an image whose axes were permuted."""
        z, y, x = (self.size[axis] for axis in axes)
        return Blocks(np.transpose(self.inside, axes), (z, y, x))

    def clear_outside(self, labels: NDArray[np.unsignedinteger]) -> None:
        """Set what lies outside to 0, in place; `labels` is (z, y, x)."""
        depth, height, width = self.size
        for index, plane in enumerate(self.inside):
            if not plane.all():
                whole = np.repeat(np.repeat(plane, height, 0), width, 1)[: labels.shape[1], : labels.shape[2]]
                labels[index * depth : (index + 1) * depth] *= whole


def body_blocks(image: NDArray[np.number], spacing_mm: Sequence[float], margin_mm: float = MARGIN_MM) -> Blocks:
    """Find the body in a CT: everything but the air that reaches the sides of its slice, grown by a margin.

    Air inside (lungs, bowel) is enclosed in each axial slice and so belongs to the body. A table and clothes are body, too,
    where they are denser than air. An image without air of about -1000 HU at its sides is body as a whole: a crop, other units.

    Parameters
    ----------
    image : ndarray, shape (z, y, x)
        Hounsfield units, slices axial.
    spacing_mm : (z, y, x)
        Of the voxels.
    margin_mm : float
        How far it is grown, along each axis (a box, so no less in any direction).
    """
    z, y, x = (max(1, round(_BLOCK_MM / spacing)) for spacing in spacing_mm)
    air = block_max(image, (z, y, x)) < AIR_HU
    in_slices = np.zeros((3, 3, 3), bool)
    in_slices[1] = ndimage.generate_binary_structure(2, 1)
    numbers, count = ndimage.label(air, in_slices)
    reaching = np.zeros(count + 1, bool)
    for side in (numbers[:, 0], numbers[:, -1], numbers[:, :, 0], numbers[:, :, -1]):
        reaching[side] = True
    reaching[0] = False
    grown = [2 * int(np.ceil(margin_mm / (size * spacing))) + 1 for size, spacing in zip((z, y, x), spacing_mm, strict=True)]
    return Blocks(ndimage.maximum_filter(~reaching[numbers], size=grown, mode="nearest"), (z, y, x))


def union(masks: Sequence[Blocks]) -> Blocks:
    """Return what lies in any of several masks of one grid."""
    return Blocks(np.logical_or.reduce([mask.inside for mask in masks]), masks[0].size)


def block_max(image: NDArray[np.number], size: tuple[int, int, int]) -> NDArray[np.number]:
    """Return the highest value of each block of `size` voxels; blocks at the end of an axis may be cut."""
    planes = np.stack([image[start : start + size[0]].max(0) for start in range(0, image.shape[0], size[0])])
    rows = np.maximum.reduceat(planes, np.arange(0, planes.shape[1], size[1]), axis=1)
    result: NDArray[np.number] = np.maximum.reduceat(rows, np.arange(0, rows.shape[2], size[2]), axis=2)
    return result


def needs(
    body: Blocks,
    along: Sequence[Cells],
    offset: Sequence[int],
    inner: Sequence[slice],
    origin: Sequence[int],
    patch: Sequence[int],
) -> bool:
    """Tell whether any voxel inside the mask depends on a tile.

    A label depends on the eight corners of its cell on the network's grid, and a corner on every tile that holds it.

    Parameters
    ----------
    body : Blocks
        The mask, on the image's grid in the network's axes.
    along : sequence of Cells
        Between which slices, rows and columns of the network's grid each of the image's lies.
    offset : (z, y, x)
        Where what is labelled begins in the image.
    inner : sequence of slice
        The network's grid without its padding.
    origin, patch : (z, y, x)
        The tile.
    """
    part = []
    for cells, first, own, begin, length, size in zip(along, offset, inner, origin, patch, body.size, strict=True):
        low, high = begin - own.start, begin + length - own.start
        touched = np.flatnonzero((cells.high >= low) & (cells.low < high))
        if touched.size == 0:
            return False
        part.append(slice((touched[0] + first) // size, (touched[-1] + first) // size + 1))
    return bool(body.inside[tuple(part)].any())
