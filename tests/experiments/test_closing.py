"""The end of a run: its record says finished when all is on disk, not before."""

from __future__ import annotations

import pytest

from contextlab import run
from contextlab.experiments import closing
from contextlab.files import read_json, read_record, write_record
from tests.experiments.test_run import COMPRESS, same_results


@pytest.mark.page
@pytest.mark.parametrize("last", ["build_report", "write_compress_page"])
def test_a_run_that_is_killed_before_its_report_goes_on(tmp_path, monkeypatch, finished, last):
    class Killed(BaseException):
        pass

    def die(*arguments, **options):
        raise Killed

    folder = finished(COMPRESS, tmp_path / "run").folder
    record = read_record(folder / "record.json")
    write_record(folder / "record.json", {**{k: v for k, v in record.items() if k != "files"}, "status": "interrupted"})
    for name in record["files"]:
        (folder / name).unlink()  # as if it had been stopped after its last job
    with monkeypatch.context() as patch:
        patch.setattr(closing, last, die)
        with pytest.raises(Killed):
            run(COMPRESS, out=folder, resume=True)
    assert read_json(tmp_path / "run" / "record.json")["status"] == "running"
    done = run(COMPRESS, out=tmp_path / "run", resume=True)
    assert read_json(tmp_path / "run" / "record.json")["status"] == "finished"
    assert done.report.exists()
    assert "finished" in done.report.read_text()
    named = read_json(tmp_path / "run" / "record.json")["files"]
    assert {"compress.html", "compress.parquet", "report.html", "results.parquet"} <= set(named)
    assert all((tmp_path / "run" / name).exists() for name in named)
    assert same_results(done.results, run(COMPRESS, out=tmp_path / "run", resume=True).results)
