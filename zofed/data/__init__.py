"""Names and files to documents, examples and clients' shares."""
