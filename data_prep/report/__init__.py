"""What a build made of its rows: report.json, CSVs, and a page."""
