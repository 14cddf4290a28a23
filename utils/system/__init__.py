"""The operating system: command line, exit codes, signals, locks, files, rendering."""
