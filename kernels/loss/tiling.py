"""Tiles of the element kernels, planned against the memory that one core has.

An NPU's vector core works in a Unified Buffer (192 KiB on Ascend 910B and 910C) that holds
everything a tile needs at once, twice over for what is loaded and stored because the compiler
double-buffers those. A kernel that asks for more does not compile there. On CUDA the same tile
lives in registers, for which the plan is smaller. Shape legend: V vocabulary rows of the tile's
matrix, n its token columns.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
UNIFIED_BUFFER = 192 * KIB
"""Bytes of one vector core of an Ascend 910B or 910C."""
RESERVE = 0.15
"""Share of the budget that is left to the compiler: scalars, alignment gaps, the reduction's
scratch."""
ROW_BYTES = 32
"""A row of a tile must start on such a boundary to be moved in one burst."""
GRID_LIMIT = 65535
"""coreDim is 16 bits wide."""
COLUMNS = 128
"""Tokens of a tile, the contiguous direction: 256 bytes of bfloat16, several bursts long. Chunks
are cut at multiples of it, and a chunk without padding is what cuBLAS adds the shift to in the
product itself."""
REGISTER_TILE = 4096
"""Elements of a tile on CUDA: 32 float32 registers in each of 128 threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """The buffers that one kernel keeps on the chip."""

    moved: int
    """Tiles loaded or stored in the operands' dtype; double-buffered."""
    wide: int
    """Tiles of float32 between them that are alive at once."""
    vectors: int
    """float32 vectors over the tile's columns."""
    row_vectors: int = 0
    """float32 vectors over the tile's rows (the bias); double-buffered."""


EXP_STATS = Footprint(moved=2, wide=3, vectors=8, row_vectors=1)
FACTOR = Footprint(moved=2, wide=4, vectors=6)
FOOTPRINTS = {"exp_stats": EXP_STATS, "factor": FACTOR}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A block of `rows` vocabulary entries by `columns` tokens."""

    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns


def bytes_of(footprint: Footprint, tile: Tile, itemsize: int) -> int:
    """Bytes that a kernel with `footprint` needs on the chip for `tile`."""
    moved = 2 * footprint.moved * tile.elements * itemsize
    wide = 4 * footprint.wide * tile.elements
    return (
        moved
        + wide
        + 4 * footprint.vectors * tile.columns
        + 2 * 4 * footprint.row_vectors * tile.rows
    )


def plan(
    footprint: Footprint, itemsize: int, *, budget: int = UNIFIED_BUFFER, limit: int = 1 << 20
) -> Tile:
    """The largest tile, in powers of two, that fits `budget` bytes and has at most `limit`
    elements.

    It is `COLUMNS` wide, or narrower where too little fits, and has as many rows as then fit.
    Raises ValueError if not even two rows of one burst fit.
    """
    room = int(budget * (1 - RESERVE))
    columns = COLUMNS
    while columns * itemsize >= ROW_BYTES:
        rows = 1 << 12
        while rows > 1:
            tile = Tile(rows=rows, columns=columns)
            if tile.elements <= limit and bytes_of(footprint, tile, itemsize) <= room:
                return tile
            rows //= 2
        columns //= 2
    raise ValueError(
        f"a budget of {budget} bytes holds no tile of {footprint} at {itemsize} bytes an element"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """The work items of a [V, n] matrix, each a slice of rows by a block of columns; `programs`
    programs take them in turns."""

    tile: Tile
    column_blocks: int
    splits: int
    """Slices of the vocabulary; each gives partial sums, added afterwards in a fixed order."""
    slice_rows: int
    """Rows of one slice, a multiple of the tile's; the last slice may hold fewer."""
    programs: int

    @property
    def items(self) -> int:
        return self.column_blocks * self.splits


def launch(tile: Tile, rows: int, columns: int, cores: int) -> Launch:
    """Deals `rows` x `columns` out over `cores`: enough slices that every core has work, one
    program per core."""
    column_blocks = max(1, -(-columns // tile.columns))
    tiles = max(1, -(-rows // tile.rows))
    splits = min(tiles, max(1, -(-4 * cores // column_blocks)))
    slice_tiles = -(-tiles // splits)
    splits = -(-tiles // slice_tiles)
    programs = min(cores, column_blocks * splits, GRID_LIMIT)
    return Launch(
        tile=tile,
        column_blocks=column_blocks,
        splits=splits,
        slice_rows=slice_tiles * tile.rows,
        programs=programs,
    )
