"""The command line: its options, what it prints, and one file a command."""
