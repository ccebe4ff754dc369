"""What a person types and reads: entry, help, messages, screen, logs."""
