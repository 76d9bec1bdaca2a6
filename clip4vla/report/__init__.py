"""Reports for people: logs, curves, pages."""
