"""What runs write for people: CSV files, progress bars, figures."""
