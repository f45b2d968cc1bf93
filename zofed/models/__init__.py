"""Names and folders to a module, and what of it trains."""
