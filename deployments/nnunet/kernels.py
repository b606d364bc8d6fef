"""The loops over voxels that no library has: adding up tiles, and labels on the image's grid.

Compiled by numba, in parallel over rows, for one set of types each (`add_tile`: two), so that all of it can be compiled before
the first request: arrays are contiguous, have channels last, so that what belongs to one voxel lies together, and labels are
uint16, whatever they become.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

#: bfloat16 is the upper half of float32.
BF16_SHIFT = 16


@numba.njit(parallel=True, cache=True, nogil=True)
def add_tile(ring, weights, depth_of_ring, tile, shift, gaussian, origin, flips, share, first_channel, count):
    """Add a tile's values, weighted, to the ring of slices.

    `ring[(z0 + z) % depth, y0 + y, x0 + x] += gaussian[z, y, x] * share * tile[z, y, x]`

    Parameters
    ----------
    ring : float32, (depth, ny, nx, channels); weights : float32, (depth, ny, nx)
        Sums so far.
    tile : uint32 or uint16, (pz, py, px, c)
        As the network gave it, still mirrored along the axes in `flips`: the bits of float32, or of bfloat16.
    shift : uint32
        How far its bits are shifted to be those of float32: 0, or 16.
    gaussian : float32, (pz, py, px)
        Importance of each voxel of the tile, as it lies in the volume.
    origin : (z0, y0, x0)
        Of the tile in the volume.
    share : float
        What this pass counts for.
    first_channel : int
        Where in the ring its channels go.
    count : bool
        Whether the weights are added, too.
    """
    pz, py, px, channels = tile.shape
    z0, y0, x0 = origin
    for prange_z in numba.prange(pz):
        z = np.int64(prange_z)  # numba counts unsigned, and unsigned + signed is a float
        to = (z0 + z) % depth_of_ring
        source_z = pz - 1 - z if flips[0] else z
        bits = np.empty(channels, np.uint32)
        values = bits.view(np.float32)
        for y in range(py):
            source_y = py - 1 - y if flips[1] else y
            for x in range(px):
                source_x = px - 1 - x if flips[2] else x
                g = gaussian[z, y, x]
                if count:
                    weights[to, y0 + y, x0 + x] += g
                g *= share
                for c in range(channels):
                    bits[c] = np.uint32(tile[source_z, source_y, source_x, c]) << shift
                for c in range(channels):
                    ring[to, y0 + y, x0 + x, first_channel + c] += g * values[c]


@numba.njit(parallel=True, cache=True, nogil=True)
def take_slice(sums, weights, out):
    """Divide a slice's sums by its weights into `out`, and clear both; what no tile has touched becomes zero."""
    ny, nx, channels = sums.shape
    for y in numba.prange(ny):
        for x in range(nx):
            w = weights[y, x]
            factor = np.float32(1) / w if w > 0 else np.float32(0)
            weights[y, x] = 0
            for c in range(channels):
                out[y, x, c] = sums[y, x, c] * factor
                sums[y, x, c] = 0


@numba.njit(cache=True, nogil=True, inline="always")
def _half(value, floats, bits):
    """Round to float16's precision (ties to even), as nnU-Net's arrays of logits do."""
    floats[0] = value
    b = bits[0]
    bits[0] = (b + np.uint32(0xFFF) + ((b >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return floats[0]


@numba.njit(parallel=True, cache=True, nogil=True)
def decide(logits, regions, half, codes):
    """Find each voxel's code in a slice of logits, (ny, nx, k), which is rounded in place where `half`.

    Without regions the code is the first of the highest channels; with them 1 + the last channel above zero, or 0.
    """
    ny, nx, k = logits.shape
    for y in numba.prange(ny):
        floats = np.zeros(1, np.float32)
        bits = floats.view(np.uint32)
        for x in range(nx):
            if half:
                for c in range(k):
                    logits[y, x, c] = _half(logits[y, x, c], floats, bits)
            code = 0
            if regions:
                for c in range(k):
                    if logits[y, x, c] > 0:
                        code = c + 1
            else:
                best = logits[y, x, 0]
                for c in range(1, k):
                    if logits[y, x, c] > best:
                        best = logits[y, x, c]
                        code = c
            codes[y, x] = code


@numba.njit(parallel=True, cache=True, nogil=True)
def fill_slices(
    lower, upper, lower_codes, upper_codes, wz, y_start, y_high, wy, x_start, x_high, wx, regions, half, numbers, out
):
    """Label the image's slices that lie between two slices of the network's grid.

    A trilinear interpolation is a weighted mean of its cell's eight corners. So where all eight have the same highest channel,
    that channel is the highest everywhere in the cell; and a channel that lies below another one at all eight corners lies
    below it everywhere. Only the remaining channels of the remaining cells are interpolated: the answer is exact.

    Parameters
    ----------
    lower, upper : float32, (ny, nx, k)
        Logits of the two slices.
    lower_codes, upper_codes : (ny, nx)
        From `decide`.
    wz : float32, (n,)
        Where the image's slices lie between them, from 0 to 1.
    y_start, x_start : (ny + 1,), (nx + 1,)
        The image's rows whose lower neighbour is row `i` are `y_start[i]` to `y_start[i + 1]`.
    y_high, x_high : (ny,), (nx,)
        Their upper neighbour.
    wy, wx : float32
        Where they lie between the two.
    regions, half : bool
        As in `decide`; `half` also rounds what is interpolated.
    numbers : uint16, (codes,)
        Label of each code.
    out : uint16, (n, rows, columns)
        Labels.
    """
    ny, nx, k = lower.shape
    n = wz.shape[0]
    for prange_y in numba.prange(ny):
        yl = np.int64(prange_y)
        if y_start[yl] == y_start[yl + 1]:
            continue
        corners = np.empty((8, k), np.float32)
        dominated = np.empty(k, np.bool_)
        least = np.empty(k, np.float32)
        candidates = np.empty(k, np.int64)
        codes = np.empty(8, np.int64)
        w = np.empty(8, np.float64)
        floats = np.zeros(1, np.float32)
        bits = floats.view(np.uint32)
        yh = y_high[yl]
        for xl in range(nx):
            if x_start[xl] == x_start[xl + 1]:
                continue
            xh = x_high[xl]
            codes[0] = lower_codes[yl, xl]
            codes[1] = lower_codes[yl, xh]
            codes[2] = lower_codes[yh, xl]
            codes[3] = lower_codes[yh, xh]
            codes[4] = upper_codes[yl, xl]
            codes[5] = upper_codes[yl, xh]
            codes[6] = upper_codes[yh, xl]
            codes[7] = upper_codes[yh, xh]
            same = True
            highest = codes[0]
            for i in range(1, 8):
                same = same and codes[i] == codes[0]
                highest = max(highest, codes[i])
            if same:
                label = numbers[codes[0]]
                for z in range(n):
                    for y in range(y_start[yl], y_start[yl + 1]):
                        for x in range(x_start[xl], x_start[xl + 1]):
                            out[z, y, x] = label
                continue
            for c in range(k):
                corners[0, c] = lower[yl, xl, c]
                corners[1, c] = lower[yl, xh, c]
                corners[2, c] = lower[yh, xl, c]
                corners[3, c] = lower[yh, xh, c]
                corners[4, c] = upper[yl, xl, c]
                corners[5, c] = upper[yl, xh, c]
                corners[6, c] = upper[yh, xl, c]
                corners[7, c] = upper[yh, xh, c]
            found = 0
            if regions:
                for c in range(highest - 1, -1, -1):  # from the last that any corner has
                    positive = False
                    for i in range(8):
                        positive = positive or corners[i, c] > 0
                    if positive:
                        candidates[found] = c
                        found += 1
            else:
                for c in range(k):
                    dominated[c] = False
                for i in range(8):
                    best = codes[i]
                    known = False
                    for j in range(i):
                        known = known or codes[j] == best
                    if known:
                        continue
                    margin = np.float32(0)
                    for j in range(8):
                        margin = max(margin, abs(corners[j, best]))
                    # Rounding may make two channels equal, and then the first one wins.
                    margin = margin * np.float32(0.002) if half else np.float32(0)
                    for c in range(k):
                        least[c] = corners[0, best] - corners[0, c]
                    for j in range(1, 8):
                        for c in range(k):
                            least[c] = min(least[c], corners[j, best] - corners[j, c])
                    for c in range(k):
                        dominated[c] = dominated[c] or least[c] > margin
                for c in range(k):
                    if not dominated[c]:
                        candidates[found] = c
                        found += 1
            for z in range(n):
                for y in range(y_start[yl], y_start[yl + 1]):
                    for x in range(x_start[xl], x_start[xl + 1]):
                        a, b, d = np.float64(wz[z]), np.float64(wy[y]), np.float64(wx[x])
                        w[0] = (1 - a) * (1 - b) * (1 - d)
                        w[1] = (1 - a) * (1 - b) * d
                        w[2] = (1 - a) * b * (1 - d)
                        w[3] = (1 - a) * b * d
                        w[4] = a * (1 - b) * (1 - d)
                        w[5] = a * (1 - b) * d
                        w[6] = a * b * (1 - d)
                        w[7] = a * b * d
                        code = 0
                        if regions:
                            for f in range(found):
                                value = 0.0
                                for i in range(8):
                                    value += w[i] * corners[i, candidates[f]]
                                if value > 0:
                                    code = candidates[f] + 1
                                    break
                        else:
                            top = -np.inf
                            for f in range(found):
                                value = 0.0
                                for i in range(8):
                                    value += w[i] * corners[i, candidates[f]]
                                if half:
                                    value = np.float64(_half(np.float32(value), floats, bits))
                                if value > top:
                                    top = value
                                    code = candidates[f]
                        out[z, y, x] = numbers[code]


def starts(low: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return, for sorted `low`, where each source's targets begin; shape (count + 1,)."""
    result: NDArray[np.int64] = np.searchsorted(low, np.arange(count + 1)).astype(np.int64)
    return result


def highs(low: NDArray[np.int64], high: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return each source's upper neighbour; itself where no target lies between."""
    result: NDArray[np.int64] = np.arange(count)
    result[low] = high
    return result
