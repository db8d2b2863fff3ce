"""Tables and figures of finished and unfinished runs: `write_report`. Needs no torch and changes no run."""

from lowmem.report.write import ReportResult, write_report

__all__ = ["ReportResult", "write_report"]
