"""How many pixels a block takes: numbers in, numbers out."""

from __future__ import annotations

from disco_kernels.cuda.arguments import THREADS

# Blocks for a multiprocessor to have at once, where there is work for so many: 1024 threads with
# four loads of 16 bytes each are 64 KB under way, and the memory of an H100 needs 20 KB (3.35 TB/s
# for 0.8 us, over 132 multiprocessors).
BLOCKS_EACH = 4
# Pieces of a thread in a larger tile: twice the unrolled loop (kPackUnroll). More would only make
# the last blocks longer.
MOST_PIECES = 8 * THREADS
FEWEST_PIECES = THREADS


def tile_pixels(
    num_pixels: int, groups: int, groups_in_piece: int, num_parts: int, multiprocessors: int
) -> int:
    """Pixels of a tile, for ``groups`` a pixel in the mean."""
    pieces = num_pixels * groups * num_parts / groups_in_piece
    wanted = pieces / (BLOCKS_EACH * multiprocessors)
    wanted = min(MOST_PIECES, max(FEWEST_PIECES, wanted))
    return max(1, min(num_pixels, int(wanted * groups_in_piece / groups)))


def quantised_tile_pixels(
    pixels: int, images: int, most_groups: int, tile: int, num_parts: int, multiprocessors: int
) -> int:
    """Pixels of a tile of one image, at least ``tile``, which is `tile_pixels`'s choice.

    A block finds all its scales first, so tiles are as large as still occupies the device.
    """
    tiles = max(1, 2 * BLOCKS_EACH * multiprocessors // (images * num_parts))
    # Positions are divided by multiplication, exact up to 2**31 / groups (quotient()).
    most = 2**30 // most_groups**2
    return max(1, min(pixels, most, max(tile, -(-pixels // tiles))))


def magnitude_blocks(
    pixels: int, images: int, groups: int, multiprocessors: int
) -> tuple[int, int, int]:
    """Groups of a chunk, chunks, and pixels of a split.

    A block takes at most a quarter of its threads' groups, so that few of them are left over, and
    all splits of all images together are one round of blocks: every block of the next launch reads
    what all splits of its image found.
    """
    chunks = -(-groups // (THREADS // 4))
    chunk = -(-groups // chunks)
    rows = THREADS // chunk
    splits = max(1, BLOCKS_EACH * multiprocessors // (images * chunks))
    return chunk, chunks, max(rows, -(-pixels // splits))
