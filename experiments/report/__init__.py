"""Reports that compare runs: tables, figures and a web page."""
