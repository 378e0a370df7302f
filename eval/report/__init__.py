"""The report: its schema, its tables for terminal, Markdown, CSV and HTML, its figures."""

__all__: list[str] = []
