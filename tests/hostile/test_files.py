"""Files made to harm whoever opens them: each ends in one line, in seconds, in memory of the order of the file."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import pickles as p
from outcomes import outcomes

DOUBLED = b"".join(b"2" + p.TUPLE2 for _ in range(60))  # DUP, TUPLE2: twice as many leaves each time
SHARED = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + p.TUPLE2 for i in range(60))  # the same through the memo

# What is wrong with a pickle -> the pickle, and what the message says of it.
PICKLES: dict[str, tuple[bytes, str]] = {
    "tuple of 2^60 leaves as a key": (
        p.HEAD + p.EMPTY_DICT + p.text("x") + DOUBLED + p.text("y") + p.SETITEM + p.STOP, "DUP"),
    "the same through the memo": (
        p.HEAD + p.EMPTY_DICT + p.text("x") + SHARED + p.text("y") + p.SETITEM + p.STOP, "expected strings as keys"),
    "a key nested 900,000 deep": (
        p.HEAD + p.EMPTY_DICT + p.NONE + p.TUPLE1 * 900_000 + p.NONE + p.SETITEM + p.STOP, "expected strings as keys"),
    "a value nested 900,000 deep": (p.state(a=p.NONE + p.TUPLE1 * 900_000), "got tuple under 'a'"),
    "lists nested 450,000 deep": (p.state(a=p.EMPTY_LIST * 450_000 + p.APPEND * 449_999), "got list under 'a'"),
    "a state dict nested 900,000 deep": (p.HEAD + p.NONE + p.TUPLE1 * 900_000 + p.STOP, "state dict"),
    "a tuple of 2^60 leaves as a size": (
        p.state(a=p.tensor(p.text("x") + SHARED, (1, 1))), "non-negative whole numbers, got [a list of 2, a list of 2]"),
    "a memo of 2^27 entries": (p.HEAD + p.EMPTY_DICT + b"r" + struct.pack("<I", 2**27) + p.STOP, "state dict"),
    "a memo of 2^32 - 1 entries": (p.HEAD + p.EMPTY_DICT + b"r" + struct.pack("<I", 2**32 - 1) + p.STOP, "state dict"),
    "a memo that is not there": (p.HEAD + b"j" + struct.pack("<I", 2**31) + p.STOP, "cannot be read"),
    "100,000 dimensions of 2^62": (
        p.state(a=p.tensor((2**62,) * 100_000, (1,) * 100_000)), "'a': expected at most"),
    "2^62 x 0": (p.state(a=p.tensor((2**62, 0), (0, 1))), "overflows"),
    "65 dimensions": (p.state(a=p.tensor((1,) * 65, (1,) * 65)), "'a': expected at most"),
    "negative strides": (p.state(a=p.tensor((4,), (-1,), 3)), "unreadable description"),
    "a negative start": (p.state(a=p.tensor(start=-4)), "unreadable description"),
    "a start beyond the storage": (p.state(a=p.tensor(start=2**61)), "which has 16"),
    "a shape of integers of 2,000 bits": (p.state(a=p.tensor((2**2000,), (1,))), "an integer of 2001 bits"),
    "a shape of booleans": (
        p.state(a=p.tensor(b"\x88" + p.TUPLE1)), "non-negative whole numbers, got [true]"),
    "strides of zero": (p.state(a=p.tensor((2**40,), (0,))), "not contiguous"),
    "a key that is a path": (p.state(a=p.tensor(source=p.storage("../../etc/passwd"))), "not in the archive"),
    "a key that is a number": (
        p.state(a=p.tensor(source=p.MARK + p.text("storage") + p.name("torch FloatStorage") + p.number(0)
                           + p.text("cpu") + p.number(4) + p.TUPLE + p.PERSISTENT)), "unreadable storage"),
    "a storage of an unknown kind": (p.state(a=p.tensor(source=p.storage(kind="QInt8Storage"))), "asks for torch.QInt8Storage"),
    "a persistent id of one part": (p.state(a=p.text("0") + p.PERSISTENT), "unreadable storage"),
    "defaults of a function": (
        p.HEAD + p.name(p.REBUILD) + p.NONE + p.EMPTY_DICT + p.text("__defaults__") + p.number(1) + p.TUPLE1
        + p.SETITEM + p.TUPLE2 + p.BUILD + p.STOP, "BUILD"),
    "state of a dictionary's type": (
        p.HEAD + p.name("collections OrderedDict") + p.EMPTY_DICT + p.text("x") + p.number(1) + p.SETITEM + p.BUILD
        + p.STOP, "BUILD"),
    "a function called with too much": (p.HEAD + p.name(p.REBUILD) + p.EMPTY_TUPLE + p.REDUCE + p.STOP, "cannot be read"),
    "a call of no function": (p.HEAD + p.text("os.system") + p.EMPTY_TUPLE + p.REDUCE + p.STOP, "cannot be read"),
    "a type of tensors called": (p.HEAD + p.name("torch FloatStorage") + p.EMPTY_TUPLE + p.REDUCE + p.STOP, "cannot be read"),
    "code": (p.HEAD + p.name("os system") + p.text("true") + p.TUPLE1 + p.REDUCE + p.STOP, "asks for os.system"),
    "code by its names on the stack": (
        b"\x80\x04" + p.text("os") + p.text("system") + b"\x93" + p.text("true") + p.TUPLE1 + p.REDUCE + p.STOP, "os.system"),
    "code by NEWOBJ": (p.HEAD + p.name("collections OrderedDict") + p.EMPTY_TUPLE + b"\x81" + p.STOP, "NEWOBJ"),
    "a number of 5,000 digits": (p.HEAD + b"L" + b"9" * 5000 + b"L\n" + p.STOP, "cannot be read"),
    "a number of 4 GB": (p.HEAD + b"\x8b" + struct.pack("<i", 2**31 - 1) + p.STOP, "cannot be read"),
    "a text of 4 GB": (p.HEAD + b"X" + struct.pack("<I", 2**32 - 1) + p.STOP, "cannot be read"),
    "bytes of 2^63": (p.HEAD + b"\x8e" + struct.pack("<Q", 2**63) + p.STOP, "cannot be read"),
    "half a surrogate pair": (p.state(**{"\ud800": p.tensor()}), "\\ud800"),
    "a terminal's commands": (p.state(**{"\x1b[2J": p.tensor()}), "\\x1b[2J"),
    "a name of 100,000 characters": (p.state(**{"n" * 100_000: p.tensor()}), "at most"),
    "marks without end": (p.HEAD + p.MARK * 900_000 + p.STOP, "cannot be read"),
    "nothing to pop": (p.HEAD + p.TUPLE2 + p.STOP, "cannot be read"),
    "no dictionary to set": (p.HEAD + p.NONE + p.text("a") + p.NONE + p.SETITEM + p.STOP, "cannot be read"),
    "a key without its value": (p.HEAD + p.EMPTY_DICT + p.MARK + p.text("a") + p.SETITEMS + p.STOP, "cannot be read"),
    "three million values": (p.HEAD + p.EMPTY_LIST * (3 * 10**6) + p.STOP, "more than"),
    "half a million entries in the memo": (
        p.HEAD + b"".join(p.EMPTY_LIST + b"r" + struct.pack("<I", i) for i in range(499_999)) + p.STOP, "state dict"),
    "a dictionary of 300,000 keys": (
        p.HEAD + p.EMPTY_DICT + p.MARK + b"".join(p.text(f"{i:06}") + p.EMPTY_DICT for i in range(300_000)) + p.SETITEMS
        + p.STOP, "got dict under '000000'"),
    "a text that is larger in memory": (
        p.HEAD + p.text("\U0001f642" + "x" * 10**7) + p.STOP, "state dict"),
    "no end": (p.HEAD + p.EMPTY_DICT, "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "one storage 10,000 times": (p.state(**{f"t{i}": p.tensor((2**18,), source=p.storage(count=2**18)) for i in range(10_000)}), "as much as"),
    "dims that are nested": (
        p.HEAD + p.EMPTY_DICT + p.text("dims") + p.EMPTY_DICT + p.text("n") + SHARED.replace(b"X", b"X") * 0 + p.EMPTY_LIST
        + p.SETITEM + p.SETITEM + p.text("model_state_dict") + p.state(a=p.tensor())[2:-1] + p.SETITEM + p.STOP, "dims"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What became of every one of PICKLES."""
    root = tmp_path_factory.mktemp("pickles")
    paths = []
    for number, (pickle, _) in enumerate(PICKLES.values()):
        large = b"t9999" in pickle
        paths.append(p.archive(root / f"{number}.pt", pickle, {"data/0": bytes(2**20)} if large else None))
    return dict(zip(PICKLES, outcomes(paths), strict=True))


@pytest.mark.parametrize("attack", PICKLES)
def test_a_hostile_pickle_is_one_line(attack: str, ends: dict[str, dict[str, object]]) -> None:
    end, size = ends[attack], len(PICKLES[attack][0])
    assert end["end"] == "refused" and PICKLES[attack][1] in str(end["text"]), end
    assert "\n" not in str(end["text"]) and float(str(end["seconds"])) < 5
    assert float(str(end["megabytes"])) < 200 + 3 * size / 1e6, end


def patch(signature: bytes, offset: int, value: bytes, which: int = 0) -> Callable[[bytes], bytes]:
    """Overwrites a field in one of the records of a zip file that begin with `signature`."""

    def change(data: bytes) -> bytes:
        at = -1
        for _ in range(which + 1):
            at = data.index(signature, at + 1)
        return data[: at + offset] + value + data[at + offset + len(value) :]

    return change


def bomb(data: bytes) -> bytes:
    """The same with data.pkl compressed: a gigabyte of it in a megabyte."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x/data.pkl", "w") as member:
        for _ in range(1024):
            member.write(bytes(2**20))
    return stream.getvalue()


def crowded(count: int, zip64: bool = False, gap: int = 0) -> bytes:
    """A zip file whose directory has `count` entries of 46 bytes. gap: bytes between the records of zip64."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count % 65536, count % 65536, 0 if zip64 else 46 * count, 0, 0)
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, 46 * count, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 46 * count, 1)
    return entry * count + ((record + bytes(gap) + locator) if zip64 else b"") + end


def huge(data: bytes) -> bytes:
    """zip64: data.pkl takes 2^63 - 1 bytes."""
    extra = struct.pack("<HHQQ", 1, 16, 2**63 - 1, 2**63 - 1)
    at = data.index(CENTRAL)
    name = data[at + 28 : at + 30]
    end = at + 46 + int.from_bytes(name, "little")
    entry = data[at : at + 20] + b"\xff" * 8 + name + struct.pack("<H", len(extra)) + data[at + 32 : end] + extra
    tail = data.index(END)
    size = len(entry) - (end - at)
    sizes = struct.unpack("<L", data[tail + 12 : tail + 16])[0] + size
    return data[:at] + entry + data[end:tail] + data[tail : tail + 12] + struct.pack("<L", sizes) + data[tail + 16 :]


def afar(offset: int) -> Callable[[bytes], bytes]:
    """zip64: data.pkl begins at `offset`."""

    def change(data: bytes) -> bytes:
        extra = struct.pack("<HHQ", 1, 8, offset)
        at, tail = data.index(CENTRAL), data.index(END)
        length = int.from_bytes(data[at + 28 : at + 30], "little")
        end = at + 46 + length
        entry = data[at : at + 30] + struct.pack("<H", len(extra)) + data[at + 32 : at + 42] + b"\xff" * 4
        size = struct.unpack("<L", data[tail + 12 : tail + 16])[0] + len(extra)
        middle = entry + data[at + 46 : end] + extra + data[end:tail]
        return data[:at] + middle + data[tail : tail + 12] + struct.pack("<L", size) + data[tail + 16 :]

    return change


CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
ZIPS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a version to come": (patch(CENTRAL, 6, b"\xff\x00"), "zip file version 25.5"),
    "a patch of itself": (patch(CENTRAL, 8, b"\x20\x00"), "or a patch"),
    "encrypted": (patch(CENTRAL, 8, b"\x01\x00"), "is encrypted"),
    "an unknown compression": (patch(CENTRAL, 10, b"\x63\x00"), "is compressed"),
    "two sizes": (patch(CENTRAL, 20, b"\x07\x00\x00\x00"), "is compressed"),
    "a wrong checksum": (patch(CENTRAL, 16, b"1234"), "the checksum of 'x/data.pkl' is wrong"),
    "a size of 4 GB": (patch(CENTRAL, 20, b"\xfe\xff\xff\xff" * 2), "the limit is"),
    "a size of 2^63": (huge, "the limit is"),
    "a storage of 4 GB": (patch(CENTRAL, 20, b"\xfe\xff\xff\xff" * 2, 3), "reaches over the end"),
    "a member beyond the end": (patch(CENTRAL, 42, b"\xf0\xff\xff\xff"), "no local header"),
    "a member where none begins": (patch(CENTRAL, 42, b"\x01\x00\x00\x00"), "no local header"),
    "a member at 2^64 - 1": (afar(2**64 - 1), "no local header"),
    "a member at 2^63": (afar(2**63), "no local header"),
    "a member just before the end": (lambda d: afar(len(d) - 3)(d), "no local header"),
    "a directory that is smaller than told": (patch(END, 12, b"\x01\x00\x00\x00"), "x.pt"),
    "a directory that begins later": (lambda d: patch(END, 16, struct.pack("<L", len(d)))(d), "x.pt"),
    "a name that is no text": (lambda d: patch(CENTRAL, 46, b"\xff\xff")(patch(CENTRAL, 8, b"\x00\x08")(d)), "x.pt"),
    "a member twice": (patch(CENTRAL, 46, b"x/data.pkl/", 1), "x.pt"),
    "a directory of 4 GB": (patch(END, 12, b"\xff\xff\xff\xff"), "the limit is"),
    "a directory somewhere else": (patch(END, 16, b"\xff\xff\xff\x7f"), "x.pt"),
    "a directory of 900,000 members": (lambda _: crowded(900_000), "the limit is"),
    "a directory of 900,000 members and a comment": (lambda _: crowded(900_000)[:-2] + b"\x01\x00x", "does not end"),
    "a directory of 900,000 members, told by zip64": (lambda _: crowded(900_000, True), "the limit is"),
    "a directory of 900,000 members, told from afar": (lambda _: crowded(900_000, True, 8), "does not end"),
    "a directory of 180,000 members": (lambda _: crowded(180_000), "twice"),
    "a gigabyte in a megabyte": (bomb, "is compressed"),
    "half of it": (lambda data: data[: len(data) // 2], "x.pt"),
    "only its end": (lambda data: data[-22:], "x.pt"),
    "zeros": (lambda _: bytes(100), "x.pt"),
    "before 1.6": (lambda _: bytes.fromhex("80028a0a6cfc9c46f9206aa85019") + b".\x80\x02M\xe9\x03.", "before 1.6"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ZIPS)
def test_a_hostile_archive_is_one_line(attack: str, tmp_path: Path) -> None:
    change, expected = ZIPS[attack]
    path = p.archive(tmp_path / "x.pt", p.state(a=p.tensor()))
    path.write_bytes(change(path.read_bytes()))
    (end,) = outcomes([path])
    assert end["end"] == "refused" and expected in end["text"] and "\n" not in end["text"], end
    assert end["seconds"] < 5 and end["megabytes"] < 200 + 3 * path.stat().st_size / 1e6, end


def header(**entries: object) -> bytes:
    return json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} | entries).encode()


HEADERS: dict[str, tuple[bytes, str]] = {
    "200,000 dimensions of 2^63 - 1": (b'{"a":' + header(shape=[2**63 - 1] * 200_000) + b"}", "at most 32 dimensions"),
    "65 dimensions": (b'{"a":' + header(shape=[1] * 64 + [0]) + b"}", "at most 32 dimensions"),
    "2^62 x 0": (b'{"a":' + header(shape=[2**62, 0]) + b"}", "overflows"),
    "0 x 2^63 - 1 bits": (b'{"a":' + header(shape=[0, 2**62, 2], dtype="BOOL") + b"}", "overflows"),
    "half a surrogate pair": (b'{"\\ud800":' + header() + b"}", "\\ud800"),
    "half a surrogate pair in the middle of an entry": (b'{"a":{"\\ud800":1}}', "\\ud800"),
    "a terminal's commands": (b'{"\\u001b[2J":' + header() + b"}", "\\x1b[2J"),
    "text backwards": (b'{"a\\u202eb":' + header() + b"}", "\\u202e"),
    "a layer of 5,000 digits": (b'{"encoder.layers.%s.a":' % (b"9" * 5000) + header() + b"}", "at most 255"),
    "a dtype of 5,000 digits": (b'{"a":' + header(dtype=0).replace(b"0", b"9" * 5000, 1) + b"}", "not JSON"),
    "a dtype of 4,000 digits": (b'{"a":' + header(dtype=0).replace(b"0", b"9" * 4000, 1) + b"}", "integer of 13288 bits"),
    "a shape of 4,000 digits": (b'{"a":' + header(shape=[0]).replace(b"[0]", b"[%s]" % (b"9" * 4000), 1) + b"}", "13288 bits"),
    "a nested dtype": (b'{"a":' + header(dtype=0).replace(b"0", b"[" * 900 + b"]" * 900, 1) + b"}", "dtype"),
    "lists nested 100,000 deep": (b'{"a":' + b"[" * 100_000, "nested too deep"),
    "objects nested 100,000 deep": (b'{"a":' * 100_000, "nested too deep"),
    "ten million lists": (b'{"a":[' + b"[]," * 10**7 + b"[]]}", "more than 1,500,000 values"),
    "seven hundred thousand objects": (b'{"a":[' + b"{}," * 700_000 + b"{}]}", "'a'"),
    "seven hundred thousand keys": (b'{"a":{' + b",".join(b'"%d":0' % i for i in range(700_000)) + b"}}", "'a'"),
    "a key 700,000 times": (b'{"a":{' + b",".join([b'"":0'] * 700_000) + b"}}", "has the key '' twice"),
    "33 MB of text": (b'{"a":"' + b"x" * 33 * 2**20 + b'"}', "over the limit"),
    "text that is larger in memory": (b'{"a":"\\ud83d\\ude42' + b"x" * 20 * 2**20 + b'"}', "'a'"),
    "an infinite offset": (b'{"a":' + header().replace(b"[0, 0]", b"[0, 1e999]") + b"}", "non-negative"),
    "Infinity": (b'{"a":' + header().replace(b"[0, 0]", b"[0, Infinity]") + b"}", "Infinity"),
    "metadata of numbers": (b'{"__metadata__":{"a":1}}', "__metadata__"),
    "nothing but metadata": (b'{"__metadata__":{"lors.expert":"{}"}}', "no tensor"),
}  # fmt: skip


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    root = tmp_path_factory.mktemp("headers")
    paths = [root / f"{number}.safetensors" for number in range(len(HEADERS))]
    for path, (text, _) in zip(paths, HEADERS.values(), strict=True):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
    return dict(zip(HEADERS, outcomes(paths), strict=True))


@pytest.mark.parametrize("attack", HEADERS)
def test_a_hostile_header_is_one_line(attack: str, headers: dict[str, dict[str, object]]) -> None:
    end, size = headers[attack], len(HEADERS[attack][0])
    assert end["end"] == "refused" and HEADERS[attack][1] in str(end["text"]), end
    assert "\n" not in str(end["text"]) and float(str(end["seconds"])) < 5, end
    assert float(str(end["megabytes"])) < 200 + 3 * size / 1e6, end


def test_overlapping_members_are_no_more_than_the_file(tmp_path: Path) -> None:
    """A thousand members in the same megabyte, each a tensor: a gigabyte to merge, out of a file of one megabyte."""
    path, count = tmp_path / "x.pt", 1000
    tensors = {f"t{i}": p.tensor((2**18,), source=p.storage(str(i), count=2**18)) for i in range(count)}
    p.archive(path, p.state(**tensors), {"data/0": bytes(2**20)} | {f"data/{i}": b"" for i in range(1, count)})
    data = bytearray(path.read_bytes())
    first = data.index(b"x/data/0", data.index(CENTRAL)) - 46
    for i in range(1, count):
        at = data.index(b"x/data/%d" % i, first) - 46
        data[at + 16 : at + 28], data[at + 42 : at + 46] = data[first + 16 : first + 28], data[first + 42 : first + 46]
    path.write_bytes(data)
    (end,) = outcomes([path])
    assert end["end"] == "refused" and "times as much as the file" in end["text"], end


def test_a_pickle_written_by_hand_is_read(tmp_path: Path) -> None:
    """The parts that the attacks are made of are sound."""
    path = p.archive(tmp_path / "x.pt", p.state(a=p.tensor(), b=p.tensor((2, 2), (2, 1))))
    assert outcomes([path])[0] | {"seconds": 0, "megabytes": 0} == {
        "end": "read", "text": "a, b", "seconds": 0, "megabytes": 0,
    }  # fmt: skip
