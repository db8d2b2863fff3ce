"""Tables and figures of finished and unfinished runs: `write_report`. Needs no torch and changes no run."""

from lowmem.report.tables import TABLE_HEADER, TableRow
from lowmem.report.write import ReportResult, write_report

__all__ = ["TABLE_HEADER", "ReportResult", "TableRow", "write_report"]
