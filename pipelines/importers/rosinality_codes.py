"""Codes that rosinality/vq-vae-2-pytorch extracted, read without running what they may contain.

The file is an LMDB with the keys b"length" and b"0", b"1", ...; a value is a pickled namedtuple
`dataset.CodeRow(top, bottom, filename)` of two int64 arrays `(h, w)` and a text. A pickle is a
program that may call anything. Here every name that it may use is a class that does nothing, any
other name or instruction is refused, and an array is made only of a description that was checked.
"""

import io
import pickle
import pickletools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vqvae2.common.errors import UserError

OPCODES = (
    "PROTO FRAME MARK STOP GLOBAL STACK_GLOBAL MEMOIZE BINPUT BINGET REDUCE NEWOBJ BUILD NONE "
    "NEWTRUE NEWFALSE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BININT BININT1 BININT2 "
    "SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES"
)
"""What pickling a row emits in protocols 3 and 4, the usual ones. Others could take all memory."""
LONGEST_VALUE = 1 << 26  # bytes of a row: grids of 2000 x 2000


class Row(NamedTuple):
    """The codes of an image."""

    codes: tuple[np.ndarray, np.ndarray]  #: `(h, w)` int64 of top and bottom
    name: str  #: the image's file: its folder and its name


def read_rows(path: Path, numbers: Sequence[int] | None = None) -> Iterator[Row]:
    """The rows of an LMDB file or folder, all or those of these numbers. Raises a `UserError` if
    `lmdb` is not installed, it is no such file, or a row is missing or broken."""
    # The library and the file.
    try:
        import lmdb
    except ImportError:
        raise UserError("the package lmdb is not installed: pip install lmdb.") from None
    file = path / "data.mdb" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist: give the LMDB file, or its folder.")
    try:
        with lmdb.open(str(file), subdir=False, readonly=True, lock=False) as environment:
            # Reading beyond the end of a file would end the process.
            size = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if file.stat().st_size < size:
                raise UserError(f"{path} is cut off: it is shorter than it says; copy it again.")

            # The number of rows, and the rows.
            with environment.begin() as transaction:
                length = transaction.get(b"length") or b""
                if not length.isdigit() or len(length) > 18 or not int(length):
                    expected = "give a finished code file of rosinality/vq-vae-2-pytorch"
                    fault = "has no number of rows under the key 'length'"
                    raise UserError(f"{path} {fault}: {expected}.")
                for number in range(int(length)) if numbers is None else numbers:
                    value = transaction.get(str(number).encode())
                    if value is None:
                        fault = f"says it has {int(length)} rows, but row {number} is not there"
                        raise UserError(f"{path} {fault}: extract its codes again.")
                    yield read_row(value, f"{path}: row {number}")
    except lmdb.Error as error:
        raise UserError(f"{path} cannot be read as LMDB ({error}): copy it again.") from None


def read_row(value: bytes, where: str) -> Row:
    """One pickled row; a `UserError` that begins with `where` if it is anything else."""
    try:
        if len(value) > LONGEST_VALUE:
            raise ValueError(f"it has {len(value)} bytes")
        other = {opcode.name for opcode, _, _ in pickletools.genops(value)} - {*OPCODES.split()}
        if other:
            raise ValueError(f"it uses {', '.join(sorted(other))}")
        row = _Unpickler(io.BytesIO(value)).load()
        if type(row) is not _CodeRow:
            raise ValueError(f"it is of type {type(row).__name__}")
        top, bottom, name = row.arguments
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(f"its file name is {name!r:.80}")
        return Row((_to_array(top), _to_array(bottom)), name)
    except Exception as error:  # a broken pickle raises anything
        reason = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
        expected = "no pickled CodeRow of int64 arrays and a file name"
        raise UserError(f"{where} is {expected} ({reason}): it is not imported.") from None


def _to_array(described: Any) -> np.ndarray:
    """The `(h, w)` array that a pickle described."""
    if type(described) is not _Array:
        raise ValueError(f"an array was expected, not {type(described).__name__}")
    _, shape, kind, in_columns, data = described.state
    sides = [side for side in shape if type(side) is int and 0 < side < 1 << 16]
    if type(shape) is not tuple or not len(sides) == len(shape) == 2:
        raise ValueError(f"an array has the shape {shape!r:.80}")
    if type(kind) is not _Type or (kind.arguments[0], kind.state[1]) != ("i8", "<"):
        raise ValueError("an array's type is not <i8 (int64)")
    if type(data) is not bytes or len(data) != 8 * shape[0] * shape[1]:
        raise ValueError("an array has more or fewer bytes than its shape says")
    return np.frombuffer(data, "<i8").reshape(shape, order="F" if in_columns else "C")


class _StandIn:
    """What a name in a pickle stands for. Calling it, and setting the state of what that returns,
    runs nothing: both are remembered."""

    arguments: Any = ()
    state: Any = ()

    def __new__(cls, *arguments: Any) -> "_StandIn":
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


# What they remember. CodeRow: the arguments top, bottom, filename. Array: the state version, shape,
# type, whether in columns, bytes. Type: the arguments "i8", ..., the state version, byte order, ...
_KINDS: list[Any] = [type(name, (_StandIn,), {}) for name in ("CodeRow", "Array", "Type")]
_CodeRow, _Array, _Type = _KINDS
NAMES: dict[tuple[str, str], type] = {
    ("dataset", "CodeRow"): _CodeRow,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _StandIn,  # an argument of `_reconstruct`
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        """The stand-in of an allowed name; nothing is looked up."""
        if (module, name) not in NAMES:
            raise ValueError(f"it names {module}.{name}")
        return NAMES[module, name]
