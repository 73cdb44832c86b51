"""The command line: its options, its output, and one file for each command."""
