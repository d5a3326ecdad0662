"""Read a table out of a pickle that may be hostile.

A pickle is a program: it names functions and has them called. Here every name that it may use
stands for a record that only keeps what it is given; nothing of NumPy or pandas runs while the file
is read, and any other name is refused. The table is put together from the records afterwards.
This also reads files of pandas versions whose classes are gone.
"""

import io
import pickle
import re
import struct
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, ClassVar

import numpy as np
import pandas as pd

from ccf_llm_hf.errors import InputError

# No bare "O" array from bytes, no structured types, no dates: what is not listed is refused.
MOST_COLUMNS = 1000
NUMBER = re.compile(r"b1|[iu][1248]|f[248]")


class _Record:
    """Keeps the arguments and the state that a pickle means for another object."""

    def __new__(cls, *args: Any) -> "_Record":
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    args: tuple
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Record):
    """An array whose content comes as its state: (version, shape, dtype, in columns, content)."""


class _Buffer(_Record):
    """An array made of (bytes, dtype, shape, order)."""


class _Scalar(_Record):
    """A NumPy number made of (dtype, bytes)."""


class _DType(_Record):
    """A type made of (name, ...), its state holding the order of bytes in second place."""


class _Block(_Record):
    """Columns of one type: (values, places, dimensions)."""


class _NewIndex(_Record):
    """An index made of (class, its arguments by name)."""


class _Index(_Record):
    """The class of an index, or one that holds values."""


class _RangeIndex(_Record):
    """The class of an index that counts."""


class _Manager(_Record):
    """All blocks of a table: (blocks, axes)."""


class _Frame(_Record):
    """A table, its blocks in its state under `_mgr`."""


class _NDArray(_Record):
    """The class of arrays; only ever an argument."""


ADMITTED: dict[tuple[str, str], type] = {
    ("builtins", "slice"): slice,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _NDArray,
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas.core.internals.managers", "BlockManager"): _Manager,
    ("pandas._libs.internals", "_unpickle_block"): _Block,
    ("pandas.core.indexes.base", "_new_Index"): _NewIndex,
    ("pandas.core.indexes.base", "Index"): _Index,
    ("pandas.core.indexes.range", "RangeIndex"): _RangeIndex,
    ("pandas.core.indexes.numeric", "Int64Index"): _Index,
}
# As newer versions of either name them.
for _name, _class in (("DataFrame", _Frame), ("Index", _Index), ("RangeIndex", _RangeIndex)):
    ADMITTED["pandas", _name] = _class
for _core in ("numpy.core", "numpy._core"):
    ADMITTED[_core + ".multiarray", "_reconstruct"] = _Array
    ADMITTED[_core + ".multiarray", "scalar"] = _Scalar
    ADMITTED[_core + ".numeric", "_frombuffer"] = _Buffer


class _Unpickler(pickle._Unpickler):
    """An unpickler that knows the names in ADMITTED and no other.

    It is Python's own in Python: the one in C makes room for as much as a file says that it holds,
    so that some hundred bytes claim gigabytes. This one holds what was read.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    read: Callable[[int], bytes]  # both are made when it loads
    append: Callable[[Any], None]

    def __init__(self, stream: BinaryIO, file: str) -> None:
        super().__init__(stream)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        """The record that stands for a name.

        Raises:
            InputError: the name is not admitted.
        """
        if (module, name) not in ADMITTED:
            raise InputError(
                f"{self.file}: the pickle asks for {module}.{name}, which is no plain NumPy, "
                "pandas or built-in container: refused, get the table as CSV or parquet"
            )
        return ADMITTED[module, name]

    def load_bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray


def read_pickled_table(stream: BinaryIO, file: str) -> pd.DataFrame:
    """The pandas table in a pickle, without running what the pickle asks for (our choice).

    Args:
        stream: the pickle's bytes, uncompressed.
        file: what to call it in messages.

    Returns:
        The columns in their order: numbers as they are, anything else as objects (text, None, NaN,
        lists, arrays of numbers). Rows are numbered anew.

    Raises:
        InputError: the pickle names something else than NumPy's, pandas' and built-in containers,
            is damaged, or holds no table that pandas 1.3 or newer wrote.
    """
    try:
        return _table(_Unpickler(io.BytesIO(stream.read()), file).load())
    except InputError:
        raise
    # Whatever a damaged or hostile file makes of the records ends here.
    except (
        *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError),
        *(MemoryError, OverflowError, RecursionError, OSError, AssertionError, struct.error),
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{file} is no readable pickle of a pandas table ({reason}): get it again, or as CSV "
            "or parquet"
        ) from error


def _table(loaded: Any) -> pd.DataFrame:
    if not isinstance(loaded, _Frame):
        raise ValueError(f"it holds no table but {type(loaded).__name__}")
    blocks, (names, index) = loaded.state["_mgr"].args
    labels, rows = _labels(names), len(_labels(index))
    if not rows or len(labels) > MOST_COLUMNS:
        raise ValueError(f"{rows} rows of {len(labels)} columns")
    columns: dict[str, Any] = {}
    for block in blocks:
        values, places = block.args[:2]
        places = range(len(labels))[places] if isinstance(places, slice) else _values(places)
        shape, flat = _shape(values), _values(values)
        if shape != (len(places), rows):
            raise ValueError(f"columns of shape {shape} in {rows} rows")
        for row, place in enumerate(places):
            columns[labels[place]] = flat[row * rows : (row + 1) * rows]
    if set(columns) != set(labels) or len(set(labels)) < len(labels):
        raise ValueError("columns are missing or repeated")
    return pd.DataFrame({name: _column(columns[name]) for name in labels})


def _column(values: Any) -> pd.Series:
    if isinstance(values, np.ndarray):
        return pd.Series(values)
    cells = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        cells[place] = _values(value) if isinstance(value, _Record) else value
    return pd.Series(cells, dtype=object)


def _labels(index: Any) -> Any:
    """What an index holds: a sequence of labels."""
    kind, arguments = index.args
    if kind is _RangeIndex:
        return range(arguments["start"], arguments["stop"], arguments["step"])
    return _values(arguments["data"])


def _shape(array: Any) -> tuple[int, ...]:
    shape = array.args[2] if isinstance(array, _Buffer) else array.state[1]
    return tuple(int(size) for size in shape)


def _values(array: Any) -> Any:
    """The content of an array, row after row: flat numbers `(n,)`, or a list of objects."""
    if isinstance(array, _Scalar):
        dtype, content = array.args
        return np.frombuffer(content, _dtype(dtype))[0].item()
    if isinstance(array, _Buffer):
        content, dtype, shape, order = array.args
    elif isinstance(array, _Array):
        _, shape, dtype, in_columns, content = array.state
        order = "F" if in_columns else "C"
    else:
        raise ValueError(f"{type(array).__name__} in the place of an array")
    if isinstance(content, list):  # objects come row after row, in whatever order they were
        return _checked_objects(content)
    numbers = np.frombuffer(content, _dtype(dtype)).reshape(shape, order=order)
    return numbers.ravel(order="C")


def _checked_objects(content: Iterable[Any]) -> list[Any]:
    cells = list(content)
    for cell in cells:
        if not isinstance(
            cell, str | int | float | list | tuple | _Array | _Buffer | _Scalar | None
        ):
            raise ValueError(f"a cell holds {type(cell).__name__}")
    return cells


def _dtype(dtype: Any) -> np.dtype:
    """A type of numbers; anything else is a ValueError."""
    name = dtype.args[0]
    if not isinstance(name, str) or not NUMBER.fullmatch(name):
        raise ValueError(f"values of type {name!r}")
    order = dtype.state[1] if dtype.state else "|"
    return np.dtype((order if order in ("<", ">") else "=") + name)
