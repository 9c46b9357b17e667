"""docs/performance.md is what its command makes of the committed results."""

from benchmarks import performance_page
from benchmarks.machine import ROOT


def test_the_page_is_up_to_date(monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
    monkeypatch.setattr(performance_page, "ROOT", tmp_path)
    performance_page.main()
    assert (tmp_path / "docs" / "performance.md").read_text() == (ROOT / "docs" / "performance.md").read_text()
