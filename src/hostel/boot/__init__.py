"""Everything that is in guest memory before the first instruction."""
