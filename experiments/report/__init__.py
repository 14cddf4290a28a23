"""Compares runs: tables, figures and a web page."""
