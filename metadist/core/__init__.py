"""What every room stands on: tasks, messages, random draws, errors, files, redaction."""
