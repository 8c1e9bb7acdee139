import sympy
import torch

from omnicompile.capture.pairs import attention_pairs
from omnicompile.capture.symbols import GenericSize, SizeReader
from omnicompile.program import Sym

TOKENS, IMAGES, PATCHES, CLIPS, FRAMES = 20011, 23, 2240, 11, 1700
NONE = (None, None)


def make() -> SizeReader:
    return SizeReader(
        [
            GenericSize(Sym.S, TOKENS, TOKENS),
            GenericSize(Sym.I, IMAGES, IMAGES),
            GenericSize(Sym.N, IMAGES * PATCHES, IMAGES * 35, PATCHES),
            GenericSize(Sym.C, CLIPS, CLIPS),
            GenericSize(Sym.A, CLIPS * FRAMES, CLIPS * 17, FRAMES),
        ]
    )


def bounds(length: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    cu = torch.arange(0, total + 1, length, dtype=torch.int32)
    return cu, cu


def test_text_attends_within_a_sample() -> None:
    assert attention_pairs(make(), (1, 8, TOKENS, 64), (1, 2, TOKENS, 64), NONE, 0) == Sym.S2


def test_segments_that_are_images_give_their_sum_of_squares() -> None:
    shape = (1, 16, IMAGES * PATCHES, 80)
    assert attention_pairs(make(), shape, shape, bounds(PATCHES, IMAGES * PATCHES), 0) == Sym.N2


def test_windows_of_fixed_size_grow_with_the_patches() -> None:
    shape = (1, 16, IMAGES * PATCHES, 80)
    assert attention_pairs(make(), shape, shape, bounds(64, IMAGES * PATCHES), 0) == 64 * Sym.N


def test_one_clip_per_row_gives_the_sum_of_squares() -> None:
    shape = (CLIPS, 20, FRAMES // 2, 64)
    assert attention_pairs(make(), shape, shape, NONE, 0) == Sym.A2 / 4


def test_images_of_a_fixed_size_count_the_images() -> None:
    shape = (IMAGES, 16, 729, 72)
    assert attention_pairs(make(), shape, shape, NONE, 0) == 729**2 * Sym.I


def test_cross_attention_to_a_fixed_encoder() -> None:
    pairs = attention_pairs(make(), (CLIPS, 20, 448, 64), (CLIPS, 20, 1500, 64), NONE, 0)
    assert pairs == 448 * 1500 * Sym.C


def test_a_sliding_window_bounds_the_pairs() -> None:
    shape = (1, 8, TOKENS, 64)
    assert attention_pairs(make(), shape, shape, NONE, 512) == sympy.Min(Sym.S2, 1024 * Sym.S)


def test_no_tokens_no_pairs() -> None:
    empty = torch.zeros(1, dtype=torch.int32)
    assert attention_pairs(make(), (1, 16, 0, 80), (1, 16, 0, 80), (empty, empty), 0) == 0


def test_a_last_window_that_is_smaller_reads_as_a_window() -> None:
    """A clip of 1700 frames in windows of 800: other lengths of clips leave another rest, the window stays."""
    clips = [start for clip in range(CLIPS) for start in range(clip * FRAMES, (clip + 1) * FRAMES, 800)]
    cu = torch.tensor([*clips, CLIPS * FRAMES], dtype=torch.int32)
    shape = (1, 20, CLIPS * FRAMES, 64)
    assert attention_pairs(make(), shape, shape, (cu, cu), 0) == 800 * Sym.A


def test_one_segment_over_all_images_is_a_product() -> None:
    shape = (1, 16, IMAGES * PATCHES, 80)
    assert attention_pairs(make(), shape, shape, bounds(IMAGES * PATCHES, IMAGES * PATCHES), 0) == Sym.N**2
