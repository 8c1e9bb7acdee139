"""How tensors of a Hugging Face checkpoint become parameters, by the rules of transformers, a part at a time.

transformers renames keys and, where a checkpoint has another layout (an expert a tensor, say, and the model all
experts in one), converts tensors by operations such as stack, concatenate, split and transpose. To read no more than
one part of the result, the operations are run on small tensors that hold the number of each element. They tell which
part of which source the wanted part is made of, and the same operations on those parts alone must give the wanted
numbers; where they do not, the sources are read whole.

A part is given in pieces of at most `PIECE_BYTES`, one at a time: an expert, or some rows of a matrix. So beside what
the caller keeps there is only one piece with its sources, and what an operation copies (stacked, then joined: three
times a piece at most).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnicompile.errors import InputError
from omnicompile.runtime.safetensors_folder import SafetensorsFolder

Part = tuple[slice, ...]
PIECE_BYTES = 1 << 20
_MOST_NUMBERS = 1 << 23  # of elements that are numbered at once, 4 bytes each


def pieces_of(part: Part, item_bytes: int, limit: int) -> Iterator[Part]:
    """`part` in consecutive pieces of at most `limit` bytes, cut along the first dimensions; of a part without elements
    itself. item_bytes: of one element."""
    sizes = [there.stop - there.start for there in part]
    dim = next((dim for dim, size in enumerate(sizes) if size > 1), None)
    if dim is None or math.prod(sizes) * item_bytes <= limit:
        yield part
        return
    rows = max(1, limit // (math.prod(sizes[dim + 1 :]) * item_bytes))
    for start in range(part[dim].start, part[dim].stop, rows):
        piece = (*part[:dim], slice(start, min(start + rows, part[dim].stop)), *part[dim + 1 :])
        yield from pieces_of(piece, item_bytes, limit)


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint. pattern: of the converter, that its key fits."""

    key: str
    pattern: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Renamed:
    """A parameter that is a tensor of the checkpoint."""

    name: str
    key: str

    def names(self) -> list[str]:
        return [self.name]

    def shape(self, folder: SafetensorsFolder, name: str) -> tuple[int, ...]:
        return folder.shape(self.key)

    def read(
        self, folder: SafetensorsFolder, name: str, part: Part, limit: int = PIECE_BYTES
    ) -> Iterator[tuple[Part, Tensor]]:
        """(piece of the whole tensor, its value): `part` in pieces, each in the memory of the mapped file."""
        for piece in pieces_of(part, folder.dtype(self.key).itemsize, limit):
            yield piece, folder.part(self.key, piece)

    def first_key(self) -> str:
        return self.key


class _AskedModel:
    """Tells whether an operation has looked at more of a model than its configuration."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.config = model.config
        self.asked = False

    def __getattr__(self, name: str) -> Any:
        self.asked = True
        return getattr(self._model, name)


class Converted:
    """Parameters that operations of transformers make of tensors of the checkpoint. first: name of the first one.

    Operations that look at the model do so to compare whole shapes: their sources are read whole.
    """

    def __init__(self, first: str, converter: Any, sources: Sequence[Source], model: Any) -> None:
        """Raises InputError when the operations do not take these sources."""
        self._first, self._converter, self._model = first, converter, _AskedModel(model)
        self._sources = list(sources)
        self._tried: dict[tuple[frozenset[int], int], tuple[list[Tensor], dict[str, Tensor]]] = {}
        try:
            made = self._run([torch.empty(source.shape, device="meta") for source in sources], range(len(sources)))
        except Exception as error:
            keys = ", ".join(source.key for source in sources[:3])
            raise InputError(f"{first} cannot be made of {keys} ...: {type(error).__name__}: {error}") from error
        self._shapes = {name: tuple(value.shape) for name, value in made.items()}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, folder: SafetensorsFolder, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def first_key(self) -> str:
        return self._sources[0].key

    def read(
        self, folder: SafetensorsFolder, name: str, part: Part, limit: int = PIECE_BYTES
    ) -> Iterator[tuple[Part, Tensor]]:
        """(piece of the whole tensor, its value): `part` in pieces where the operations can be done on parts of their
        sources, else at once."""
        dtype = folder.dtype(self._sources[0].key)
        if any(there.stop == there.start for there in part):
            yield part, torch.empty([there.stop - there.start for there in part], dtype=dtype)
            return
        try:
            for piece, wanted in self._pieces(name, part, dtype.itemsize, limit):
                if wanted is None:
                    whole = {number: _all_of(source.shape) for number, source in enumerate(self._sources)}
                    yield piece, self._made_of(folder, whole)[name][piece]
                else:
                    yield piece, self._made_of(folder, wanted)[name]
        finally:
            self._tried.clear()

    def _pieces(self, name: str, part: Part, item_bytes: int, limit: int) -> list[tuple[Part, dict[int, Part] | None]]:
        """Pieces of `part` with the parts of the sources that each is made of."""
        found = []
        for piece in pieces_of(part, item_bytes, limit):
            found.append((piece, self._parts(name, piece)))
            if found[-1][1] is None:  # rows that are not neighbours in the sources, say
                return [(part, self._parts(name, part))]
        return found

    def _made_of(self, folder: SafetensorsFolder, parts: Mapping[int, Part]) -> dict[str, Tensor]:
        return self._run([folder.part(self._sources[number].key, part) for number, part in parts.items()], list(parts))

    def _run(self, tensors: Sequence[Tensor], numbers: Sequence[int]) -> dict[str, Tensor]:
        """The operations on `tensors` in the place of the sources `numbers`."""
        converter = copy.deepcopy(self._converter)
        for tensor, number in zip(tensors, numbers):
            source = self._sources[number]
            converter.add_tensor(self._first, source.key, source.pattern, tensor)
        made = converter.convert(self._first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _parts(self, name: str, part: Part) -> dict[int, Part] | None:
        """Of the sources that are needed, the parts of which the operations make `part` of `name`; None if there are no
        such parts. A dimension of a source that the wanted part is cut along is cut, of any other all is taken."""
        if self._model.asked:
            return None
        shape = self._shapes[name]
        cut = [dim for dim, (there, size) in enumerate(zip(part, shape)) if there != slice(0, size)]
        for drivers in itertools.product(*(self._drivers(name, dim) for dim in cut)):
            parts = {number: list(_all_of(source.shape)) for number, source in enumerate(self._sources)}
            with contextlib.suppress(Exception):  # an operation that small numbers or parts do not fit
                for dim, source_dim in zip(cut, drivers):
                    self._narrow(parts, name, dim, source_dim, part[dim])
                found = {number: tuple(there) for number, there in parts.items()}
                if self._gives(name, part, cut, frozenset(dim for dim in drivers if dim is not None), found):
                    return found
        return None

    def _drivers(self, name: str, dim: int) -> list[int | None]:
        """Dimensions of the sources that may be what becomes `dim` of the result; None: it runs over whole sources."""
        found: list[int | None] = []
        for source_dim in (None, *range(min(len(source.shape) for source in self._sources))):
            with contextlib.suppress(Exception):
                if self._on_numbers(_only(source_dim), 1)[1][name].shape[dim] == self._shapes[name][dim]:
                    found.append(source_dim)
        return found

    def _on_numbers(self, kept: frozenset[int], rest: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """For each source a small tensor, whole in the dimensions `kept` and at most `rest` in all others, in which
        every element has a number of its own; and what the operations make of these. Raises ValueError where these
        would be large."""
        if (kept, rest) not in self._tried:
            shapes = [
                [size if dim in kept else min(size, rest) for dim, size in enumerate(source.shape)]
                for source in self._sources
            ]
            starts = [0, *itertools.accumulate(map(math.prod, shapes))]
            if starts[-1] > _MOST_NUMBERS:
                raise ValueError("too many elements to be numbered")
            numbers = [
                torch.arange(start, start + math.prod(shape), dtype=torch.int32).view(shape)
                for start, shape in zip(starts, shapes)
            ]
            self._tried[kept, rest] = numbers, self._run(numbers, range(len(numbers)))
        return self._tried[kept, rest]

    def _narrow(
        self, parts: dict[int, list[slice]], name: str, dim: int, source_dim: int | None, wanted: slice
    ) -> None:
        numbers, made = self._on_numbers(_only(source_dim), 1)
        needed = made[name].narrow(dim, wanted.start, wanted.stop - wanted.start).unique()
        if source_dim is None:  # one number for each source
            for number in parts.keys() - set(needed.tolist()):
                del parts[number]
            return
        for number, there in parts.items():
            here = torch.isin(numbers[number], needed)
            rows = here.movedim(source_dim, 0).flatten(1).any(1).nonzero().flatten().tolist()
            there[source_dim] = slice(rows[0], rows[-1] + 1) if rows else slice(0, 0)

    def _gives(self, name: str, part: Part, cut: list[int], kept: frozenset[int], parts: Mapping[int, Part]) -> bool:
        """Whether the operations on `parts` of numbered tensors give the numbers of the wanted part."""
        numbers, made = self._on_numbers(kept, 2)  # so that a mixture of kept dimensions with others shows
        want = made[name][tuple(there if dim in cut else slice(None) for dim, there in enumerate(part))]
        pieces = []
        for number, there in parts.items():
            own = tuple(one if dim in kept else slice(None) for dim, one in enumerate(there))
            pieces.append(numbers[number][own])
        got = self._run(pieces, list(parts))[name]
        return got.shape == want.shape and torch.equal(got, want)


def _only(dim: int | None) -> frozenset[int]:
    return frozenset() if dim is None else frozenset({dim})


def _all_of(shape: Sequence[int]) -> Part:
    return tuple(slice(0, size) for size in shape)


Conversion = Renamed | Converted


def conversions(model: Any, own: Mapping[str, Tensor], folder: SafetensorsFolder) -> tuple[list[Conversion], set[str]]:
    """How the tensors in `folder` become those of `model`, a model of transformers, and names that they would have of
    which the model has none. own: its state dict."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = model.base_model_prefix
    plain: list[Conversion] = []
    collected: dict[str, list[Source]] = {}
    unexpected: set[str] = set()
    for key in sorted(folder.names(), key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:  # as transformers: a key that needed no other name
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=own)
        if name not in own:
            unexpected.add(key)
        elif pattern is None:
            plain.append(Renamed(name, key))
        else:
            collected.setdefault(name, []).append(Source(key, pattern, folder.shape(key)))
    for name, sources in collected.items():
        plain.append(_settled(name, by_pattern[sources[0].pattern], sources, model, own[name].shape))
    return plain, unexpected


def _settled(name: str, converter: Any, sources: Sequence[Source], model: Any, own: Sequence[int]) -> Conversion:
    """The conversion of `sources`. A transposition that depends on whether the shape already fits is decided here, by
    the whole shapes."""
    from transformers.core_model_loading import Transpose

    operations = converter.operations
    if len(operations) == 1 and isinstance(operations[0], Transpose) and operations[0].check_dims:
        if sources[0].shape == tuple(own):
            return Renamed(name, sources[0].key)
        always = Transpose(operations[0].dim0, operations[0].dim1)
        converter = converter.copy(converter.source_patterns, converter.target_patterns, operations=[always])
    return Converted(name, converter, sources, model)


def by_file(found: Sequence[Conversion], folder: SafetensorsFolder) -> list[Conversion]:
    """In an order that opens each file once, but for conversions whose sources lie in several."""
    return sorted(found, key=lambda one: folder.file_of(one.first_key()))
