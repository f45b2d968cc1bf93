"""One run's folder, tables and pictures."""
