"""The page of a run: results, predictions, features and training curves in one HTML file."""

from shoulders.report.page import write_report

__all__ = ["write_report"]
