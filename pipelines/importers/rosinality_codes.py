"""Code datasets of rosinality/vq-vae-2-pytorch: an LMDB file of pickled rows, taken over without running anything that it may hold.

Its keys are b"length" and b"0", b"1", ...; a value is a pickled namedtuple `dataset.CodeRow(top, bottom, filename)` of two int64 arrays `(h, w)` and
a text. A pickle is a program that may call anything. Here it may call nothing of Python or NumPy: the few names that such a row needs stand for
inert classes of this file, every other name is refused, and what remains is checked and only then made an array.
"""

import hashlib
import io
import pickle
import pickletools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from pipelines.config import ImportCodesConfig
from prior.manifest import MANIFEST_NAME, SPLITS, Manifest, is_complete, write_manifest
from prior.shards import ShardRecord, write_shard
from vqvae2.common.config import to_dict
from vqvae2.common.errors import UserError
from vqvae2.common.runs import RunRecord, last_names, versions
from vqvae2.data import is_held_out
from vqvae2.model import VQVAE2

RECORD_NAME = "import_config.yaml"
OPCODES = frozenset(
    {
        "PROTO",
        "FRAME",
        "MARK",
        "STOP",
        "GLOBAL",
        "STACK_GLOBAL",
        "MEMOIZE",
        "BINPUT",
        "BINGET",
        "REDUCE",
        "NEWOBJ",
        "BUILD",
    }
    | {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    | {
        "BININT",
        "BININT1",
        "BININT2",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "SHORT_BINBYTES",
        "BINBYTES",
    }
)
"""What pickling such a row emits in protocols 3 and 4, the usual ones. Others may take memory without end before a single object is made."""
LONGEST_VALUE = 1 << 26  # bytes of a row: grids of 2000 x 2000


class Row(NamedTuple):
    """The codes of an image."""

    codes: tuple[np.ndarray, np.ndarray]
    """`(h, w)` int64 of top and bottom."""
    name: str
    """The image's file: its folder and its name."""


def import_codes(config: ImportCodesConfig) -> None:
    """Write the code dataset of an LMDB file; do nothing if it is finished. All rows are read and checked before the first one is written.

    Raises:
        UserError: the file is no such LMDB, a row is broken or does not fit the autoencoder, or an output folder that holds another run.
    """
    output_dir, path = Path(config.output_dir), Path(config.lmdb)
    model = VQVAE2.from_pretrained(config.vqvae)
    run = RunRecord(
        "import-codes", config, RECORD_NAME, facts={"encoder_hash": model.content_hash()}
    )
    run.check(output_dir)
    if (
        is_complete(output_dir) and not path.exists()
    ):  # it may be removed when it has been taken over
        print(f"{output_dir}: all codes are imported already.")
        return
    with open_rows(path) as rows:
        names = [
            _check(rows[i], f"{path}: row {i}", model, config.vqvae).name
            for i in tqdm(range(len(rows)), desc="checking", unit="row")
        ]
        folders = [PurePosixPath(name).parent.name for name in names]
        class_names = tuple(sorted(set(folders))) if len(set(folders)) > 1 else ()
        held_out = [is_held_out(name, config.validation_fraction) for name in names]
        ids = _unique(names)
        digest = hashlib.sha256(
            "".join(f"{name} {out}\n" for name, out in zip(ids, held_out, strict=True)).encode()
        )
        if all(held_out):
            raise UserError(
                f"{path}: all {len(names)} rows are held out: lower validation_fraction."
            )
        run = replace(run, facts={**run.facts, "rows_hash": digest.hexdigest()})
        run.check(output_dir)
        if is_complete(output_dir):
            print(f"{output_dir}: all codes are imported already.")
            return
        for left in (
            output_dir / MANIFEST_NAME,
            *output_dir.glob("*/*.parquet"),
        ):  # of an earlier, unfinished import
            left.unlink(missing_ok=True)
        run.write(output_dir)
        records: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
        for split in SPLITS:
            chosen = [
                number for number, out in enumerate(held_out) if out == (split == "validation")
            ]
            for first in tqdm(
                range(0, len(chosen), config.shard_size), desc=f"importing {split}", unit="shard"
            ):
                part = chosen[first : first + config.shard_size]
                read = [rows[number].codes for number in part]
                record = write_shard(
                    output_dir / split / f"{len(records[split]):05d}.parquet",
                    ids=[ids[number] for number in part],
                    codes=[
                        np.stack([codes[level].reshape(-1) for codes in read]) for level in range(2)
                    ],
                    codebook_sizes=model.config.codebook_size_per_level,
                    labels=np.array(
                        [class_names.index(folders[number]) for number in part], np.int32
                    )
                    if class_names
                    else None,
                )
                records[split].append(record)
    manifest = Manifest(
        encoder_hash=model.content_hash(),
        grids=model.config.grids,
        codebook_sizes=model.config.codebook_size_per_level,
        class_names=class_names,
        rows_hash=digest.hexdigest(),
        preprocessing=to_dict(model.config.image),
        train=tuple(records["train"]),
        validation=tuple(records["validation"]),
        source=last_names(config.lmdb),
        versions=versions(),
    )
    write_manifest(output_dir, manifest)
    classes = (
        f"{len(class_names)} classes ({', '.join(class_names[:12])}{', ...' * (len(class_names) > 12)})"
        if class_names
        else "no classes"
    )
    print(
        f"{output_dir}: {manifest.num_train} training rows, {manifest.num_validation} held out, {classes}."
    )


def _unique(names: Sequence[str]) -> list[str]:
    """Names as ids; one that was there before (the file keeps only the last folder of a path) with the row's number."""
    seen: set[str] = set()
    ids = []
    for number, name in enumerate(names):
        free = name
        while free in seen:
            free = f"{free}#{number}"
        ids.append(free)
        seen.add(free)
    return ids


def _check(row: Row, where: str, model: VQVAE2, vqvae: str) -> Row:
    grids, sizes = model.config.grids, model.config.codebook_size_per_level
    found = tuple(codes.shape for codes in row.codes)
    if found != grids:
        raise UserError(
            f"{where} has codes of the grids {found}, but {vqvae} makes {grids} of its images: give the autoencoder that made the codes "
            f"(vqvae2 import-weights --size: as large as the images were)."
        )
    for codes, size in zip(row.codes, sizes, strict=True):
        if not 0 <= codes.min() <= codes.max() < size:
            raise UserError(
                f"{where} has codes from {codes.min()} to {codes.max()}, but {vqvae} has {size}: give the autoencoder that made the codes."
            )
    return row


class Rows:
    """The rows of an open LMDB file, by number."""

    def __init__(self, path: Path, transaction: Any) -> None:
        self.path, self.transaction = path, transaction
        length = transaction.get(b"length")
        if length is None or not length.isdigit() or not int(length) or len(length) > 18:
            raise UserError(
                f"{path} has no number of rows under the key 'length': it is no code file of rosinality/vq-vae-2-pytorch, or an unfinished one."
            )
        self.length = int(length)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Row:
        value = self.transaction.get(str(number).encode())
        if value is None:
            raise UserError(
                f"{self.path} says that it has {self.length} rows, but row {number} is not there: extract the codes there again."
            )
        return read_row(value, f"{self.path}: row {number}")


@contextmanager
def open_rows(path: Path) -> Iterator[Rows]:
    """The rows of an LMDB file or folder.

    Raises:
        UserError: `lmdb` is not installed, or it is no such file.
    """
    try:
        import lmdb
    except ImportError:
        raise UserError(
            "the package lmdb is not installed, which reads such files: pip install lmdb."
        ) from None
    file = path / "data.mdb" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist: give the LMDB file, or its folder.")
    try:
        environment = lmdb.open(str(file), subdir=False, readonly=True, lock=False)
    except lmdb.Error as error:
        raise UserError(
            f"{path} cannot be read as LMDB ({error}): give the file that rosinality/vq-vae-2-pytorch extracted."
        ) from None
    with environment:
        if (
            file.stat().st_size
            < (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        ):
            raise UserError(f"{path} is cut off: it is shorter than it says; copy it again.")
        try:
            with environment.begin() as transaction:
                yield Rows(path, transaction)
        except lmdb.Error as error:
            raise UserError(f"{path} is broken ({error}): copy it again.") from None


def read_row(value: bytes, where: str) -> Row:
    """One pickled row.

    Raises:
        UserError: it is anything but a row of two int64 arrays and a name; `where` begins the sentence.
    """
    try:
        if len(value) > LONGEST_VALUE:
            raise ValueError(f"it has {len(value)} bytes")
        strange = {opcode.name for opcode, _, _ in pickletools.genops(value)} - OPCODES
        if strange:
            raise ValueError(f"it uses {', '.join(sorted(strange))}")
        row = _Unpickler(io.BytesIO(value)).load()
        if not isinstance(row, _CodeRow):
            raise ValueError(f"it is of type {type(row).__name__}")
        name = row.filename
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(f"its file name is {name!r:.80}")
        return Row((_to_array(row.top), _to_array(row.bottom)), name)
    except Exception as error:  # a broken pickle raises anything
        reason = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
        raise UserError(
            f"{where} is no pickled CodeRow of int64 arrays and a file name ({reason}): it is not imported."
        ) from None


def _to_array(described: Any) -> np.ndarray:
    """The `(h, w)` array that a pickle described."""
    if not isinstance(described, _Array) or described.state is None:
        raise ValueError(f"an array was expected, not {type(described).__name__}")
    _, shape, kind, in_columns, data = described.state
    plain = isinstance(shape, tuple) and all(
        type(side) is int and 0 < side < 1 << 16 for side in shape
    )
    if not plain or len(shape) != 2:
        raise ValueError(f"an array has the shape {shape!r:.80}")
    if not isinstance(kind, _Type) or kind.code != "i8" or kind.order not in ("<", "="):
        raise ValueError(
            f"an array is of type {f'{kind.order}{kind.code}' if isinstance(kind, _Type) else kind!r:.80}, not <i8 (int64)"
        )
    if type(data) is not bytes or len(data) != 8 * shape[0] * shape[1]:
        raise ValueError("an array has more or fewer bytes than its shape says")
    return np.frombuffer(data, "<i8").reshape(shape, order="F" if in_columns else "C")


class _Inert:
    """Stands for a class in a pickle; does nothing but remember what it was given. A `__setstate__` of its own keeps BUILD away from attributes."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"it sets the state of {type(self).__name__}")


class _NdarrayName(_Inert):
    """`numpy.ndarray`, which is named and not called."""

    def __init__(self, *_: Any) -> None:
        raise ValueError("it calls numpy.ndarray")


class _Type(_Inert):
    """`numpy.dtype`: its code, such as "i8", and byte order."""

    order = "="

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array(_Inert):
    """`numpy._core.multiarray._reconstruct`, which makes an empty array, and the state that fills it."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, _, _, _, _ = state
        self.state = state


class _CodeRow(_Inert):
    """`dataset.CodeRow`."""

    top: Any
    bottom: Any
    filename: Any

    def __new__(cls, top: Any, bottom: Any, filename: Any) -> "_CodeRow":
        row = super().__new__(cls)  # a pickle calls __new__ alone
        row.top, row.bottom, row.filename = top, bottom, filename
        return row


NAMES: dict[tuple[str, str], type] = {
    ("dataset", "CodeRow"): _CodeRow,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _NdarrayName,
    ("numpy", "dtype"): _Type,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        """An inert class for each of the names that a row needs; no other is looked up."""
        if (module, name) not in NAMES:
            raise ValueError(f"it names {module}.{name}")
        return NAMES[module, name]
