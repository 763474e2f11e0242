"""What is written comes back to the bit; whatever is changed, cut short or foreign is one clear error."""

import json
import os
import random
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from evenkeel.errors import EvenkeelError, StorageError
from evenkeel.storage import (
    Kind,
    digest,
    kind_of,
    read_json,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)

KIND = Kind("thing", 3, "make it again", keys=("made_for", "how"))
HEADER = {"made_for": {"steps": 20, "name": "é"}, "how": [1.5, None, "x"]}


def tensors():
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "a": whole,
        "b": whole.T,  # a view of the same memory, not contiguous
        "half": torch.randn(5).bfloat16(),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "none": torch.zeros(0, 3),
    }


def metadata_of(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]


def test_tensors_and_header_come_back_to_the_bit(tmp_path):
    given = tensors()
    header, found = read_tensors(write_tensors(tmp_path / "f", KIND, HEADER, given), KIND)
    assert header == HEADER and found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert digest("", {"x": found[name]}) == digest("", {"x": tensor})
        assert found[name].data_ptr() % 16 == 0
    assert kind_of(tmp_path / "f") == "thing"


def test_json_comes_back_and_is_readable_by_others(tmp_path):
    path = write_json(tmp_path / "f.json", KIND, HEADER)
    assert read_json(path, KIND) == HEADER
    assert json.loads(path.read_text())["made_for"] == HEADER["made_for"]


def refused(read, path):
    try:
        found = read(path, KIND)
    except StorageError as e:
        named = str(path) in str(e) and "make it again" in str(e)
        return "refused" if named else f"refused without file or remedy: {e}"
    header, tensors_ = found if isinstance(found, tuple) else (found, {})
    same = header == HEADER and digest("", tensors_) == digest("", dict(EXPECTED))
    return "same" if same else "OTHER CONTENT"


EXPECTED = {}


@pytest.mark.parametrize("form", ["tensors", "json"])
def test_no_flipped_bit_and_no_cut_gives_other_content(tmp_path, form, monkeypatch):
    torch.manual_seed(0)
    given = tensors()
    if form == "tensors":
        good, read = write_tensors(tmp_path / "good", KIND, HEADER, given), read_tensors
        monkeypatch.setitem(globals(), "EXPECTED", given)
    else:
        good, read = write_json(tmp_path / "good", KIND, HEADER), read_json
    content, bad = good.read_bytes(), tmp_path / "bad"
    assert refused(read, good) == "same"
    seen = set()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        bad.write_bytes(flipped)
        seen.add(refused(read, bad))
        bad.write_bytes(content[:position])
        seen.add(refused(read, bad))
    assert seen <= {"refused", "same"} and "refused" in seen


def resaved(path, change):
    """The same file after ``change``, the digest as it was."""
    found, metadata = load_file(path), metadata_of(path)
    change(found, metadata)
    save_file(found, path, metadata)
    return path


CHANGES = {
    "edited header": lambda t, m: m.update(how=m["how"].replace("1.5", "2.5")),
    "keys of the header swapped": lambda t, m: m.update(made_for=m["how"], how=m["made_for"]),
    "swapped tensors": lambda t, m: t.update(a=t["c"], c=t["a"]),
    "renamed tensor": lambda t, m: t.update(d=t.pop("c")),
    "another dtype": lambda t, m: t.update(a=t["a"].view(torch.int32)),
    "another shape": lambda t, m: t.update(a=t["a"].reshape(4, 3)),
    "zeroed tensor": lambda t, m: t["a"].zero_(),
    "missing tensor": lambda t, m: t.pop("a"),
    "no digest": lambda t, m: m.pop("digest"),
    "missing text": lambda t, m: m.pop("how"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(tmp_path, name):
    given = {"a": torch.ones(3, 4), "c": torch.full((3, 4), 2.0)}
    path = write_tensors(tmp_path / "f", KIND, HEADER, given)
    resaved(path, lambda t, m: None)
    read_tensors(path, KIND)
    with pytest.raises(StorageError, match="digest does not match"):
        read_tensors(resaved(path, CHANGES[name]), KIND)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.update(how=[2.5, None, "x"]),
        lambda f: f.update(extra=1),
        lambda f: f.pop("how"),
        lambda f: f.pop("digest"),
        lambda f: f.update(digest=None),
        lambda f: f["made_for"].update(steps=20.0),
    ],
)
def test_every_change_of_a_json_file_is_seen(tmp_path, change):
    path = write_json(tmp_path / "f", KIND, HEADER)
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(StorageError, match="digest does not match"):
        read_json(path, KIND)


def test_layout_and_order_of_a_json_file_do_not_matter(tmp_path):
    path = write_json(tmp_path / "f", KIND, HEADER)
    found = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(found.items()))))
    assert read_json(path, KIND) == HEADER


@pytest.mark.parametrize("write", [write_tensors, write_json])
def test_other_kinds_versions_and_places_are_named(tmp_path, write):
    read = read_tensors if write is write_tensors else read_json
    more = ({},) if write is write_tensors else ()
    path = write(tmp_path / "f", KIND, HEADER, *more)
    with pytest.raises(StorageError, match="not an evenkeel other"):
        read(path, Kind("other", 3, "x", KIND.keys))
    with pytest.raises(StorageError, match="schema version 3, this library reads 4"):
        read(path, Kind("thing", 4, "x", KIND.keys))
    with pytest.raises(StorageError, match="has at most 9"):
        read(path, Kind("thing", 3, "x", KIND.keys, max_bytes=9))
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StorageError, match="is not a file; expected a thing"):
            read(place, KIND)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 40,
        b"[]",
        b"null",
        b'{"format": "evenkeel-thing", "schema_version": 3}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 10_000,
        (8).to_bytes(8, "little") + b"[" * 200_000,
        (2**62).to_bytes(8, "little") + b"{}",
    ],
    ids=range(10),
)
def test_hostile_content_is_one_clear_error(tmp_path, content):
    path = tmp_path / "f"
    path.write_bytes(content)
    for read in (read_json, read_tensors):
        assert refused(read, path) == "refused"
    assert kind_of(path) == ""


def test_a_deep_header_with_a_matching_digest_is_one_clear_error(tmp_path):
    kind = Kind("thing", 3, "make it again", keys=("made_for",))
    path = write_tensors(tmp_path / "f", kind, {"made_for": 1}, {"a": torch.ones(1)})
    deep = "[" * 100_000

    def forge(found, metadata):
        metadata.update(made_for=deep, digest=digest(deep, found))

    with pytest.raises(StorageError, match="not a valid thing"):
        read_tensors(resaved(path, forge), kind)


def test_what_cannot_be_written_is_said_before_anything_is_written(tmp_path):
    for write, more in ((write_tensors, ({},)), (write_json, ())):
        with pytest.raises(StorageError, match="how"):
            write(tmp_path / "f", KIND, {"made_for": 1}, *more)
        with pytest.raises(StorageError, match="JSON cannot hold"):
            write(tmp_path / "f", KIND, {**HEADER, "how": {1j}}, *more)
    assert list(tmp_path.iterdir()) == []


def test_whatever_goes_wrong_inside_is_said_of_the_file():
    said = "f carries a matching digest but is not a valid thing: KeyError: 'x'"
    with pytest.raises(StorageError, match=said), KIND.valid("f"):
        {}["x"]
    with pytest.raises(KeyboardInterrupt), KIND.valid("f"):
        raise KeyboardInterrupt
    assert issubclass(StorageError, EvenkeelError) and issubclass(StorageError, ValueError)


def test_a_kind_names_its_own_error(tmp_path):
    class Mine(StorageError):
        pass

    with pytest.raises(Mine):
        read_json(tmp_path / "nothing", Kind("thing", 1, "x", error=Mine))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "f", "old")

    def half(place):
        place.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(os, "replace", lambda a, b: half(a))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_new_files_get_the_usual_permissions_and_old_ones_keep_theirs(tmp_path):
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    path = write_atomically(tmp_path / "f", lambda p: save_file({"a": torch.ones(1)}, p))
    assert stat.S_IMODE(path.stat().st_mode) == usual
    path.chmod(0o640)
    write_atomically(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_the_digest_separates_names_dtypes_shapes_and_bytes():
    generator = random.Random(0)
    made = set()
    for name in ("a", "b"):
        for shape in ((2, 3), (3, 2), (6,)):
            for dtype in (torch.float32, torch.int32):
                values = torch.zeros(shape, dtype=torch.int32).view(dtype)
                made.add(digest("", {name: values}))
                changed = values.clone()
                changed.view(torch.int32).view(-1)[generator.randrange(6)] = 1
                made.add(digest("", {name: changed}))
    assert len(made) == 24


def test_the_same_content_is_the_same_bytes(tmp_path):
    """safetensors writes metadata in an order of chance."""
    kind = Kind("many", 1, "again", keys=tuple("abcdefgh"))
    header = {key: key for key in kind.keys}
    tensors = {"x": torch.ones(3), "y": torch.arange(5)}
    paths = [write_tensors(tmp_path / f"{i}", kind, header, tensors) for i in range(4)]
    assert len({path.read_bytes() for path in paths}) == 1
    found, back = read_tensors(paths[0], kind)
    assert found == header and torch.equal(back["y"], tensors["y"])
    assert int.from_bytes(paths[0].read_bytes()[:8], "little") % 8 == 0  # tensors stay aligned
