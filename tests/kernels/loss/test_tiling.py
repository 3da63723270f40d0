"""Tile plans against the Unified Buffer, for every vocabulary and dtype that a model in use has."""

from __future__ import annotations

import pytest
from emberl.kernels.loss.tiling import (
    EXP_STATS,
    FOOTPRINTS,
    GRID_LIMIT,
    REGISTER_TILE,
    ROW_BYTES,
    UNIFIED_BUFFER,
    Footprint,
    Tile,
    bytes_of,
    launch,
    plan,
)
from hypothesis import given
from hypothesis import strategies as st

VOCABULARIES = [
    32,
    1000,
    32000,
    32768,
    49152,
    50257,
    64000,
    100352,
    128256,
    129280,
    151936,
    152064,
    163840,
    248320,
    256000,
    262144,
]


def test_bytes_of_a_plan_by_hand() -> None:
    # 32 x 128 bf16: 2 moved x 2 buffers x 8 KiB + 3 wide x 16 KiB + 8 x 512 B + 2 x 1 x 128 B
    assert (
        bytes_of(EXP_STATS, Tile(rows=32, columns=128), 2)
        == 4 * 8192 + 3 * 16384 + 8 * 512 + 2 * 128
    )


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kernel", FOOTPRINTS)
def test_every_kernel_fits_the_unified_buffer(kernel: str, itemsize: int) -> None:
    footprint = FOOTPRINTS[kernel]
    for limit in (REGISTER_TILE, 1 << 20):
        tile = plan(footprint, itemsize, limit=limit)
        assert bytes_of(footprint, tile, itemsize) <= UNIFIED_BUFFER
        assert tile.columns * itemsize % ROW_BYTES == 0
        assert tile.elements <= limit
    twice = Tile(rows=tile.rows * 2, columns=tile.columns)
    assert bytes_of(footprint, twice, itemsize) > UNIFIED_BUFFER * 0.85, (
        "the plan leaves half of the buffer idle"
    )


@pytest.mark.parametrize("cores", [1, 20, 40, 48, 528])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_launch_covers_every_entry_once_with_one_program_per_core(
    vocabulary: int, cores: int
) -> None:
    tile = plan(EXP_STATS, 2, limit=REGISTER_TILE)
    for columns in (1, 127, 128, 1024, 4096, 32768):
        deal = launch(tile, vocabulary, columns, cores)
        assert deal.slice_rows % tile.rows == 0
        assert (deal.splits - 1) * deal.slice_rows < vocabulary <= deal.splits * deal.slice_rows
        assert deal.column_blocks == -(-columns // tile.columns)
        assert deal.programs <= min(cores, GRID_LIMIT)
        assert deal.items >= min(cores, deal.column_blocks * -(-vocabulary // tile.rows)) // 2, (
            "cores left idle"
        )
        # offsets inside a tile are 32 bits wide; the base is 64
        assert tile.rows * deal.column_blocks * tile.columns < 2**31


@given(
    footprint=st.builds(
        Footprint,
        moved=st.integers(1, 4),
        wide=st.integers(0, 6),
        vectors=st.integers(0, 16),
        row_vectors=st.integers(0, 2),
    ),
    itemsize=st.sampled_from([2, 4]),
    budget=st.integers(2 * 1024, 512 * 1024),
)
def test_a_plan_never_exceeds_its_budget(footprint: Footprint, itemsize: int, budget: int) -> None:
    smallest = Tile(rows=2, columns=ROW_BYTES // itemsize)
    if bytes_of(footprint, smallest, itemsize) > int(budget * 0.85):
        with pytest.raises(ValueError, match=str(budget)):
            plan(footprint, itemsize, budget=budget)
    else:
        assert bytes_of(footprint, plan(footprint, itemsize, budget=budget), itemsize) <= budget
