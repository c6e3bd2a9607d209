"""Fill a hole in an image with patches from its surroundings.

OpenCV's inpainting (Telea 2004) continues edges into a hole but leaves a smear where it is wide. So it serves
only where there is no whole patch to take. Else a small copy is filled patch by patch from its rim inwards
(Criminisi et al. 2004, by confidence alone), and refined up to full size: each patch that touches the hole
is matched to the most alike patch outside it (PatchMatch, Barnes et al. 2009), and the hole takes the colours
that those patches vote for (Wexler et al. 2007).
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from hones_eval.editing.boxes import Window
from hones_eval.editing.photographs import Pixels

RADIUS = 2
WORK_SIDE = 150
PEELED = 2500
TRUST = 1.3
FARE = 75 * 30.0**2  # from one hole's width away: as if every channel of the patch were 30 levels off
Hole = NDArray[np.bool_]
Grid = NDArray[np.int64]
Colours = NDArray[np.float32]


class Search(NamedTuple):
    """The best-matching source for each patch around the hole."""

    y: Grid
    x: Grid
    """Positions of the patches to match, [n]."""
    place: Grid
    """[h, w]: which of those a pixel is, -1 for none."""
    allowed: Hole
    """[h, w]: centres of patches that lie wholly outside the hole."""
    trust: Colours
    """[n]: less the deeper a patch lies in the hole, where nothing is known for certain."""
    fare: float
    """Cost per squared pixel of distance between a patch and its source."""


def fill(image: Pixels, hole: Hole, seed: int) -> Pixels:
    """Fill the hole; pixels outside stay bit for bit.

    Args:
        image: [H, W, 3].
        hole: [H, W], True where colours are to be found.
        seed: of the random search.
    """
    if not hole.any() or hole.all():
        return image.copy()
    window = _context(hole)
    crop, inner = image[window.slices], hole[window.slices]
    spread = max(np.ptp(np.nonzero(inner)[0]), np.ptp(np.nonzero(inner)[1])) + 1
    scale = min(1.0, WORK_SIDE / spread)
    small, gap = _shrunk(crop, inner, scale)
    solved, y, x = _solve(small, gap, np.random.default_rng(seed))
    filled = solved if scale == 1 else _enlarged(crop, inner, solved, y, x)
    result = image.copy()
    result[window.slices] = np.where(inner[..., None], filled, crop)
    return result


def _context(hole: Hole) -> Window:
    """The bounds of the hole, grown by its own size on each side."""
    rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
    bounds = Window(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return bounds.grown(max(24, max(bounds.width, bounds.height)), hole.shape[1], hole.shape[0])


def _shrunk(crop: Pixels, hole: Hole, scale: float) -> tuple[Pixels, Hole]:
    if scale >= 1:
        return crop, hole
    size = max(8, round(crop.shape[1] * scale)), max(8, round(crop.shape[0] * scale))
    gap = cv2.resize(hole.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    return np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_AREA)), np.asarray(gap)


def _solve(pixels: Pixels, hole: Hole, chance: np.random.Generator) -> tuple[Pixels, Grid, Grid]:
    """Solve from coarse to fine; also where each pixel's patch was found, [h, w] each."""
    levels = [(pixels, hole)]
    while min(levels[-1][0].shape[:2]) >= 48 and levels[-1][1].sum() > PEELED:
        levels.append(_shrunk(*levels[-1], 0.5))
    image, found = _peel(*levels[-1])
    for depth, (known, gap) in reversed(list(enumerate(levels))):
        image = np.asarray(cv2.resize(image, known.shape[1::-1], interpolation=cv2.INTER_LINEAR), np.float32)
        image = np.where(gap[..., None], image, known).astype(np.float32)
        image, found = _refine(image, gap, found, 3 + 8 * depth, chance)
    return image.round().clip(0, 255).astype(np.uint8), *found


def _peel(pixels: Pixels, hole: Hole) -> tuple[Colours, tuple[Grid, Grid]]:
    """Copy whole patches inwards, first where the most is known; for small images.

    Returns: the filled image, and where each of its pixels was taken from.
    """
    from_y, from_x = _own_places(hole.shape)
    search = _prepare(hole)
    sources = np.argwhere(search.allowed)
    image = pixels.astype(np.float32)
    if not len(sources):
        smeared = cv2.inpaint(pixels, hole.astype(np.uint8), 3, cv2.INPAINT_TELEA)
        return np.asarray(smeared.astype(np.float32)), (from_y, from_x)
    image[hole] = 0
    sure = (~hole).astype(np.float32)
    patches = _patches(image)[sources[:, 0] * hole.shape[1] + sources[:, 1]]
    squares = patches**2
    open_ = hole.copy()
    while open_.any():
        y, x = _most_certain(open_, sure)
        rows, columns = _patch_at(y, x, hole.shape)
        here, blank = image[rows, columns], open_[rows, columns]
        offsets = (rows - y + RADIUS) * (2 * RADIUS + 1) + columns - x + RADIUS
        known, seen = np.zeros((2, 3, (2 * RADIUS + 1) ** 2), np.float32)
        known[:, offsets[~blank]], seen[:, offsets[~blank]] = 1, here[~blank].T
        # |patch - seen|^2 over what is known, short of |seen|^2, which is the same for all.
        cost = squares @ known.ravel() - 2 * (patches @ seen.ravel())
        way = (sources[:, 0] - y) ** 2 + (sources[:, 1] - x) ** 2
        best = int(np.argmin(cost + way * search.fare * known.mean()))
        image[rows[blank], columns[blank]] = patches[best].reshape(3, -1)[:, offsets[blank]].T
        from_y[rows[blank], columns[blank]] = sources[best, 0] + rows[blank] - y
        from_x[rows[blank], columns[blank]] = sources[best, 1] + columns[blank] - x
        sure[rows[blank], columns[blank]] = sure[y, x] if sure[y, x] else sure[rows, columns].mean()
        open_[rows, columns] = False
    return image, (from_y, from_x)


def _most_certain(open_: Hole, sure: Colours) -> tuple[int, int]:
    """The pixel of the hole with the most known pixels around it."""
    size = 2 * RADIUS + 1
    confidence = cv2.blur(np.where(open_, 0, sure).astype(np.float32), (size, size))
    y, x = np.unravel_index(int(np.where(open_, confidence, -1).argmax()), open_.shape)
    return int(y), int(x)


def _patch_at(y: int, x: int, shape: tuple[int, ...]) -> tuple[Grid, Grid]:
    """Row and column of each pixel of a patch, as far as the image goes."""
    rows, columns = np.mgrid[y - RADIUS : y + RADIUS + 1, x - RADIUS : x + RADIUS + 1].reshape(2, -1)
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    return rows[inside], columns[inside]


def _refine(
    image: Colours, hole: Hole, found: tuple[Grid, Grid], rounds: int, chance: np.random.Generator
) -> tuple[Colours, tuple[Grid, Grid]]:
    """Alternate matching and voting at one resolution."""
    search = _prepare(hole)
    sources = np.argwhere(search.allowed)
    if not len(sources):  # the hole leaves no whole patch outside
        grid = np.indices(hole.shape)
        return image, (grid[0], grid[1])
    y, x = _start(search, found, sources, hole.shape, chance)
    for _ in range(rounds):
        patches = _patches(image)
        cost = _cost(patches, search, y, x)
        y, x, cost = _match(patches, search, y, x, cost, chance)
        image = _vote(image, hole, search, y, x, cost)
    return image, _spread(search, y, x, hole.shape)


def _prepare(hole: Hole) -> Search:
    kernel = np.ones((2 * RADIUS + 1, 2 * RADIUS + 1), np.uint8)
    near = cv2.dilate(hole.astype(np.uint8), kernel) > 0
    y, x = np.nonzero(near)
    place = np.full(hole.shape, -1, np.int64)
    place[y, x] = np.arange(len(y))
    depth = cv2.distanceTransform(np.pad(near.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1][y, x]
    reach = max(np.ptp(y), np.ptp(x)) + 1
    return Search(y, x, place, ~near, TRUST ** -depth.astype(np.float32), FARE / float(reach) ** 2)


def _start(
    search: Search,
    found: tuple[Grid, Grid],
    sources: Grid,
    shape: tuple[int, ...],
    chance: np.random.Generator,
) -> tuple[Grid, Grid]:
    """The sources of the coarser level at this resolution; random ones where those are not allowed."""
    drawn = sources[chance.integers(len(sources), size=len(search.y))]
    ratio_y, ratio_x = shape[0] / found[0].shape[0], shape[1] / found[0].shape[1]
    row = (search.y / ratio_y).astype(np.int64).clip(0, found[0].shape[0] - 1)
    column = (search.x / ratio_x).astype(np.int64).clip(0, found[0].shape[1] - 1)
    y = (search.y + (found[0][row, column] - row) * ratio_y).astype(np.int64)
    x = (search.x + (found[1][row, column] - column) * ratio_x).astype(np.int64)
    good = _allowed(search, y, x)
    return np.where(good, y, drawn[:, 0]), np.where(good, x, drawn[:, 1])


def _patches(image: Colours) -> Colours:
    """Every pixel's patch as a row, `[h·w, patch]`."""
    size = 2 * RADIUS + 1
    views = np.lib.stride_tricks.sliding_window_view(_padded(image), (size, size), axis=(0, 1))
    return np.ascontiguousarray(views).reshape(image.shape[0] * image.shape[1], -1)


def _padded(image: Colours) -> Colours:
    """The image, mirrored beyond its edges by the radius of a patch."""
    return np.asarray(
        cv2.copyMakeBorder(image, RADIUS, RADIUS, RADIUS, RADIUS, cv2.BORDER_REFLECT_101), np.float32
    )


def _cost(patches: Colours, search: Search, y: Grid, x: Grid) -> Colours:
    """Squared difference of each patch to the patch at (y, x), plus the cost of its distance, `[n]`."""
    width = search.place.shape[1]
    difference = patches[search.y * width + search.x] - patches[y * width + x]
    way = (search.y - y) ** 2 + (search.x - x) ** 2
    return np.asarray(np.einsum("np,np->n", difference, difference) + way * np.float32(search.fare))


def _match(
    patches: Colours, search: Search, y: Grid, x: Grid, cost: Colours, chance: np.random.Generator
) -> tuple[Grid, Grid, Colours]:
    """One sweep of PatchMatch: propagate from neighbours, then search randomly at shrinking distances."""
    height, width = search.place.shape
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        row, column = search.y - dy, search.x - dx
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        owner = np.where(inside, search.place[row.clip(0, height - 1), column.clip(0, width - 1)], -1)
        known = owner >= 0
        y, x, cost = _better(
            patches,
            search,
            (y, x, cost),
            np.where(known, y[owner] + dy, y),
            np.where(known, x[owner] + dx, x),
        )
    reach = max(height, width)
    while reach >= 2:
        jump = chance.integers(-reach, reach + 1, size=(2, len(y)))
        y, x, cost = _better(patches, search, (y, x, cost), y + jump[0], x + jump[1])
        reach //= 3
    return y, x, cost


def _better(
    patches: Colours, search: Search, best: tuple[Grid, Grid, Colours], y: Grid, x: Grid
) -> tuple[Grid, Grid, Colours]:
    """Keep the cheaper of the current and the proposed source, per pixel."""
    tried = np.flatnonzero(_allowed(search, y, x) & ((y != best[0]) | (x != best[1])))
    part = search._replace(y=search.y[tried], x=search.x[tried])
    cost = _cost(patches, part, y[tried], x[tried])
    won = cost < best[2][tried]
    taken = tried[won]
    rows, columns, costs = best[0].copy(), best[1].copy(), best[2].copy()
    rows[taken], columns[taken], costs[taken] = y[taken], x[taken], cost[won]
    return rows, columns, costs


def _allowed(search: Search, y: Grid, x: Grid) -> Hole:
    height, width = search.allowed.shape
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return np.asarray(inside & search.allowed[y.clip(0, height - 1), x.clip(0, width - 1)])


def _vote(image: Colours, hole: Hole, search: Search, y: Grid, x: Grid, cost: Colours) -> Colours:
    """Each pixel of the hole becomes the mean over the patches that cover it, weighted by their match."""
    height, width = hole.shape
    loudness = search.trust * np.exp(-cost / (2 * max(1.0, float(np.quantile(cost, 0.5)))))
    total, weight = np.zeros_like(image), np.zeros((height, width), np.float32)
    padded = _padded(image)
    for dy in range(-RADIUS, RADIUS + 1):
        for dx in range(-RADIUS, RADIUS + 1):
            row, column = search.y + dy, search.x + dx
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            row, column, said = row[inside], column[inside], loudness[inside]
            total[row, column] += padded[y[inside] + dy + RADIUS, x[inside] + dx + RADIUS] * said[:, None]
            weight[row, column] += said
    voted = total / np.maximum(weight, 1e-12)[..., None]
    return np.where(hole[..., None] & (weight > 0)[..., None], voted, image).astype(np.float32)


def _spread(search: Search, y: Grid, x: Grid, shape: tuple[int, ...]) -> tuple[Grid, Grid]:
    rows, columns = _own_places(shape)
    rows[search.y, search.x], columns[search.y, search.x] = y, x
    return rows, columns


def _own_places(shape: tuple[int, ...]) -> tuple[Grid, Grid]:
    """Each pixel's own row and column, [h, w] each."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    return rows, columns


def _enlarged(crop: Pixels, hole: Hole, solved: Pixels, y: Grid, x: Grid) -> Pixels:
    """The solved colours at full size, with the fine grain of their sources."""
    height, width = hole.shape
    ratio_y, ratio_x = height / solved.shape[0], width / solved.shape[1]
    smooth = cv2.resize(solved, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    rows, columns = np.nonzero(hole)
    low_y = (rows / ratio_y).astype(np.int64).clip(0, solved.shape[0] - 1)
    low_x = (columns / ratio_x).astype(np.int64).clip(0, solved.shape[1] - 1)
    from_y = (rows + (y[low_y, low_x] - low_y) * ratio_y).astype(np.int64).clip(0, height - 1)
    from_x = (columns + (x[low_y, low_x] - low_x) * ratio_x).astype(np.int64).clip(0, width - 1)
    blurred = cv2.resize(
        cv2.resize(crop, solved.shape[1::-1], interpolation=cv2.INTER_AREA),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    ).astype(np.float32)
    grain = crop[from_y, from_x].astype(np.float32) - blurred[from_y, from_x]
    filled = smooth
    filled[rows, columns] += grain
    return filled.round().clip(0, 255).astype(np.uint8)
