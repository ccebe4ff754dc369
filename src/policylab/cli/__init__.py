"""The command line: entry, help, messages, screen, logs."""
