"""Floor 4: tables, pictures and one HTML page about finished runs."""

from inhibitor.report.page import summarise, write_report
from inhibitor.report.tables import Table, to_html, to_markdown, to_rich

__all__ = ["Table", "summarise", "to_html", "to_markdown", "to_rich", "write_report"]
