"""One step in torch alone: seeds, slopes, records, the journal, the replica. Knows no settings."""
