"""Queue orders: which waiting sequence an engine admits next."""
