"""Output of runs: CSV files, progress bars, tables, figures."""
