"""Files are whole or not there; the system's errors are one line."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from contextlab.errors import InputError, ResourceError
from contextlab.files import atomic_folder, read_json, read_tensors, write_atomic, write_json, write_tensors


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
