"""What a build made of its rows: JSON, CSV and a page."""
