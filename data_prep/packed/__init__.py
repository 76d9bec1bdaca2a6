"""Media that lie inside other files: tars, and tables of parquet or Arrow."""
