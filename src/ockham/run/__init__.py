"""How a run goes: one engine, one loop over batches, one result folder."""
