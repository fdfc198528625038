"""Files are whole or not there; the system's errors are one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat

import pytest
import torch

from contextlab.errors import InputError, ResourceError
from contextlab.files import (
    atomic_folder,
    locked,
    make_folder,
    open_regular,
    own_folder,
    present,
    read_json,
    read_record,
    read_tensors,
    read_text,
    short,
    write_atomic,
    write_json,
    write_record,
    write_tensors,
)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    with pytest.raises(KeyError), atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("whole")
    assert (tmp_path / "f" / "a").read_text() == "whole"
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("f", "link"):
        with pytest.raises(InputError, match="is there already"), atomic_folder(tmp_path / name):
            raise AssertionError("nothing may be written")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "link"]
    assert (tmp_path / "f" / "a").read_text() == "whole"


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        write_atomic(tmp_path / "file" / "inside", "x")


def test_tensors_that_share_memory_are_written_in_full(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    write_tensors(tmp_path / "t.safetensors", {"a": base, "b": base.T, "c": base[0]})
    read = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(read["b"], base.T)
    assert torch.equal(read["c"], base[0])


def test_missing_files_are_told(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="no such file"):
        read_text(tmp_path / "none.txt")


@pytest.fixture
def umask():
    """Set the mask of new files' modes; the old one comes back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_a_written_file_has_the_mode_that_open_gives(tmp_path, umask, mask):
    umask(mask)
    (tmp_path / "plain").write_text("x")
    (tmp_path / "plain folder").mkdir()
    write_atomic(tmp_path / "ours", "x")
    with atomic_folder(tmp_path / "our folder"):
        pass
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "our folder").stat().st_mode == (tmp_path / "plain folder").stat().st_mode
    for old in (0o600, 0o664, 0o755):
        for name in ("plain", "ours"):
            (tmp_path / name).chmod(old)
        (tmp_path / "plain").write_text("y")
        write_atomic(tmp_path / "ours", "y")
        assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == old
        assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == old


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "blob").chmod(0o444)
    (tmp_path / "link").symlink_to("blob")
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "blob").read_text() == "shared"
    assert not (tmp_path / "link").is_symlink()
    assert os.access(tmp_path / "link", os.W_OK)


def test_what_is_in_the_way_or_cannot_be_is_told_in_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    long = tmp_path / ("x" * 300)
    cases = [
        (lambda: write_atomic(tmp_path / "folder", "x"), "a folder of that name is in the way"),
        (lambda: make_folder(tmp_path / "file"), "a file of that name is in the way"),
        (lambda: make_folder(tmp_path / "file" / "inside"), "a part of the path is a file"),
        (lambda: write_atomic(long, "x"), "the name is longer than the file system allows"),
        (lambda: make_folder(long), "the name is longer than the file system allows"),
        (lambda: own_folder(long), "the name is longer than the file system allows"),
        (lambda: write_atomic(tmp_path / "a\0b", "x"), "no path may hold such characters"),
        (lambda: own_folder(tmp_path / "file"), "file: is a file; expected a folder"),
    ]
    for act, message in cases:
        with pytest.raises((InputError, ResourceError)) as caught:
            act()
        assert message in str(caught.value)
        assert len(str(caught.value)) < 600
        assert str(caught.value).isprintable()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    assert own_folder(tmp_path / "folder") == tmp_path / "folder"
    assert own_folder(tmp_path / "new" / "deep").is_dir()
    assert [present(tmp_path / name) for name in ("file", "none", "x" * 300, "a\0b")] == [True, False, False, False]
    assert short("a" * 300) == "a" * 300
    assert short("a" * 500) == "a" * 120 + "..." + "a" * 60
    assert short("a\nb") == "a\\nb"
    write_atomic(tmp_path / ("é" * 127), "x")  # 254 bytes; the temporary name fits, too


def test_errors_of_the_body_are_not_taken_for_those_of_the_disk(tmp_path):
    with pytest.raises(InputError, match="null byte in row 3"), atomic_folder(tmp_path / "f"):
        raise InputError("null byte in row 3")
    with pytest.raises(ValueError, match="no number"), atomic_folder(tmp_path / "f"):
        raise ValueError("no number")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    cases = [
        (tmp_path / "pipe", "is a device or a pipe; expected a file"),
        ("/dev/zero", "is a device or a pipe; expected a file"),
        (tmp_path, "is a folder; expected a file"),
        (tmp_path / "none", "no such file"),
        (tmp_path / ("x" * 300), "cannot be read (File name too long)"),
        (tmp_path / "a\0b", "embedded null"),
    ]
    for path, message in cases:
        for reads in (read_text, read_json, read_tensors):
            with pytest.raises(InputError) as caught:
                reads(path)
            assert message in str(caught.value)
    (tmp_path / "text").write_text("grüß")
    assert read_text(tmp_path / "text", 6) == "grüß"
    with pytest.raises(InputError, match="6 bytes; expected at most 5"):
        read_text(tmp_path / "text", 5)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a text file in UTF-8"):
        read_text(tmp_path / "binary")
    (tmp_path / "link").symlink_to("text")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == "grüß".encode()


def test_records_are_checked(tmp_path):
    path = tmp_path / "record.json"
    record = {"status": "finished", "loss": [0.1, float("nan"), 1e-300], "more": {"ü": [None, True]}, "n": 3}
    write_record(path, record)
    assert repr(read_record(path, {"status": str, "loss": list, "n": (int, float)})) == repr(record)
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert read_record(path)["n"] == 3  # in another order it is the same record
    write_record(path, record)
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(InputError, match=r"record.json: damaged: it has changed since it was written.*; delete it"):
        read_record(path, otherwise="delete it")
    cases = [
        ('{"a": 1}', "it lacks the key 'status'; delete it"),
        ('{"status": 3}', "'status' is a int, expected str; delete it"),
        ('{"status": true}', "'status' is a bool, expected str; delete it"),
        ("[1, 2]", "expected a mapping, found a list; delete it"),
        ("null", "expected a mapping, found a NoneType; delete it"),
        ("{", "damaged or not JSON"),
        ("[" * 100_000, "damaged or not JSON"),
        ("1" * 5000, "damaged or not JSON"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            read_record(path, {"status": str}, "delete it")
        assert message in str(caught.value)
        assert str(caught.value).startswith(str(path))
        assert str(caught.value).endswith("; delete it")
        assert "\n" not in str(caught.value)
    write_json(path, {"status": "x"})
    assert read_record(path, {"status": str}) == {"status": "x"}  # a record without a checksum


def test_tensors_are_held_to_their_checksum(tmp_path):
    path = tmp_path / "t.safetensors"
    digest = write_tensors(path, {"a": torch.arange(5.0)})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(read_tensors(path, digest)["a"], torch.arange(5.0))
    write_tensors(path, {"a": torch.arange(5.0) + 1})
    assert read_tensors(path)["a"][0] == 1
    with pytest.raises(InputError, match=r"t.safetensors: damaged: it has changed since it was written"):
        read_tensors(path, digest)


def test_a_lock_is_held_once_and_no_link_is_followed(tmp_path):
    with locked(tmp_path / ".lock"), pytest.raises(BlockingIOError), locked(tmp_path / ".lock", wait=False):
        raise AssertionError("two hold it")
    with locked(tmp_path / ".lock", wait=False):
        pass
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe"):
        told = f"{name}: expected a lock, which is an empty file; remove what is there"
        with pytest.raises(InputError, match=told), locked(tmp_path / name):
            raise AssertionError("no lock may be held")
    assert (tmp_path / "victim").read_text() == "precious"
    with pytest.raises(ResourceError, match="cannot write"), locked(tmp_path / "none" / ".lock"):
        pass


def test_each_flipped_bit_of_a_record_is_noticed_or_changes_nothing(tmp_path):
    record = {"step": 7, "loss": [0.25, 1e-9], "is": {"task": "copy", "seed": None}}
    path = tmp_path / "record.json"
    write_record(path, record)
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert read_record(path) == record, (place, bit)  # one white space for another
            except InputError as error:
                assert str(error).startswith(f"{path}: ")
