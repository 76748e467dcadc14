"""A run on one page: what was distilled from whom, how well, and what it looks like."""

from shoulders.report.page import write_report

__all__ = ["write_report"]
