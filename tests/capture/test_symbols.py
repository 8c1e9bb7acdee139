import torch

from omnicompile.capture.symbols import GenericSize, SizeReader
from omnicompile.program import Sym

S, N, I, A, C = Sym.S, Sym.N, Sym.I, Sym.A, Sym.C
TOKENS, IMAGES, PATCHES, CLIPS, FRAMES = 20011, 23, 2240, 11, 1700


def make(*model_dims: int) -> SizeReader:
    sizes = [
        GenericSize(S, TOKENS, TOKENS),
        GenericSize(I, IMAGES, IMAGES),
        GenericSize(N, IMAGES * PATCHES, IMAGES * 35, PATCHES),
        GenericSize(C, CLIPS, CLIPS),
        GenericSize(A, CLIPS * FRAMES, CLIPS * 17, FRAMES),
    ]
    return SizeReader(sizes, model_dims)


def test_a_dimension_is_a_multiple_of_one_symbol() -> None:
    reader = make()
    assert reader.dim(TOKENS) == S
    assert reader.dim(8 * TOKENS) == 8 * S
    assert reader.dim(IMAGES) == I
    assert reader.dim(IMAGES * PATCHES) == N
    assert reader.dim(IMAGES * PATCHES // 4) == N / 4
    assert reader.dim(CLIPS * FRAMES // 100 * 13) == 13 * A / 100


def test_dimensions_of_the_model_are_numbers() -> None:
    assert make().dim(4096) == 4096
    assert make().dim(1) == 1
    assert make(46).dim(46) == 46
    assert make().dim(46) == 2 * I


def test_one_token_more_or_less_is_still_the_sequence() -> None:
    assert make().dim(TOKENS - 1) == S - 1


def test_what_one_image_of_many_takes_is_its_share() -> None:
    assert make().dim(PATCHES) == N / IMAGES
    assert make().numel((PATCHES, 1280)) == 1280 * N / IMAGES


def test_all_clips_in_one_tensor_are_the_whole() -> None:
    assert make().numel((CLIPS, 128, FRAMES)) == 128 * A
    assert make().numel((CLIPS, FRAMES // 2, 1280)) == 640 * A


def test_bytes_of_tensors_and_tuples() -> None:
    reader = make()
    tensor = torch.empty(TOKENS, 8, dtype=torch.bfloat16)
    assert reader.nbytes(tensor) == 16 * S
    assert reader.nbytes((tensor, tensor.float())) == 48 * S
    assert reader.nbytes(None) == 0


def test_magnitude_is_the_number_that_was_captured() -> None:
    assert make().magnitude(2 * S + N) == 2 * TOKENS + IMAGES * PATCHES
    assert make().magnitude(Sym.N2) == IMAGES * PATCHES**2


def test_images_in_two_dimensions_are_their_patches() -> None:
    grid = (40, 56)
    reader = SizeReader([GenericSize(I, IMAGES, IMAGES), GenericSize(N, IMAGES * PATCHES, IMAGES * 35, PATCHES, grid)])
    assert reader.numel((IMAGES, 1280, 40, 56)) == 1280 * N
    assert reader.numel((IMAGES, 3, 14 * 40, 14 * 56)) == 588 * N  # pixels
    assert reader.numel((IMAGES, 1280, 20, 28)) == 320 * N  # after merging
    assert reader.numel((1, 1280, 40, 56)) == 1280 * N / IMAGES  # one of them
    assert reader.numel((IMAGES, 1280, 56, 56)) == 1280 * 56 * 56 * I  # another proportion
