"""`contextlab advise`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest

from contextlab.cli.advise import _as_it_is_now
from contextlab.cli.arguments import read_length, read_size
from contextlab.convert.variants import Variant
from contextlab.errors import InputError
from contextlab.models import build_model, save_model

SIZES = {"read_in": "token", "input_size": 64, "output_size": 64, "width": 16, "depth": 1, "heads": 2}


def test_the_command_answers_writes_and_reads_what_it_wrote(call, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    save_model(build_model("transformer", **SIZES), tmp_path / "small")
    save_model(build_model("linear_transformer", **SIZES), tmp_path / "linear")
    start = ("advise", "small", "--length", "1k", "--batch", "4", "--also", "linear", "--task", "mqar:pairs=4")
    start += ("--at", "24", "--prompts", "2", "--policy", "none", "--weights", "rtn:bits=8")
    code, out, err = call(*start, "--memory", "64kB")
    assert (code, err) == (0, "")
    assert max(map(len, (line for line in out.splitlines() if not line.startswith("Figure")))) <= 80
    told = " ".join(out.split())
    for words in ("fits in 64kB (62.5 KiB)", "left out", "too large", "measured now: 1", "In 64kB at 1,024 tokens"):
        assert words in told
    record = json.loads((tmp_path / "advised/small/advise.json").read_text())
    fits = {way["name"]: way["fits"] for way in record["ways"]}
    assert fits == {"the model itself": False, "rtn:bits=8": False, "linear": True}
    assert record["measured_at"] == 24
    assert "plotly" in (tmp_path / "advised/small/advise.html").read_text()
    code, out, err = call(*start, "--memory", "1kB", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)["advice"]
    smallest = min(record["ways"], key=lambda way: way["total_bytes"])
    start_of = "Nothing that was tried fits in 1kB at 1,024 tokens and 4 sequences"
    assert said.startswith(f"{start_of}: {smallest['name']}, the smallest, takes ")
    for more, message in (
        (("--memory", "64"), "--memory: expected a size such as 64MB, 64MiB or 1.5GB, got '64'"),
        (("--memory", "1kB", "--length", "x"), "--length: expected a number of tokens such as 512 or 16k, got 'x'"),
        (("--memory", "1kB", "--at", "0"), "--at: expected a number of tokens"),
        (("--memory", "1kB", "--budget", "5tok", "--policy", "h2o"), "expected a part of the full cache, such as 25%"),
        (("--memory", "1kB", "--weights", "wanda"), "wanda: needs data to calibrate on"),
        (("--memory", "1kB", "--also", "small"), "is not another model"),
    ):
        code, _, err = call(*start, *more)
        assert (code, message in err, err.count("\n")) == (2, True, 1), err
    # what is wrong with a task is said before weights are made smaller
    monkeypatch.setattr(Variant, "make", lambda _: pytest.fail("it was made already"))
    for more in (("advise", "small", "--memory", "1MB", "--length", "1k"), ("compress", "small", "--lengths", "1k")):
        code, _, err = call(*more, "--weights", "rtn:bits=8", "--task", "neddle", "--out", "none")
        assert (code, "did you mean 'needle'" in err, err.count("\n")) == (2, True, 1), err


def test_text_that_has_changed_is_other_data(tmp_path):
    notes = tmp_path / "texts" / "notes.txt"
    notes.parent.mkdir()
    found = []
    for text in ("one", "two", "one"):
        notes.write_text(text)
        found.append([_as_it_is_now(str(path)) for path in (notes, notes.parent)])
    assert found[0] == found[2]
    assert not {*found[0]} & {*found[1]}
    assert _as_it_is_now("associative_recall:pairs=4") == "associative_recall:pairs=4"


@pytest.mark.parametrize(
    ("text", "size"), [("64MB", 64e6), ("64 MiB", 2**26), ("1.5gb", 1.5e9), ("100B", 100), (".5kB", 500)]
)
def test_sizes_are_read(text, size):
    assert read_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["64", "", "MB", "-1MB", "0MB", "1e3MB", "64MBit", "nanMB", "9999999999999GB"])
def test_what_is_no_size_is_refused_in_one_line(text):
    with pytest.raises(InputError, match="--memory: expected a size"):
        read_size(text, "--memory")


def test_lengths_are_read():
    assert [read_length(text, "--length") for text in ("512", "16k", " 1K ")] == [512, 16384, 1024]
