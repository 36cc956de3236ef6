"""What goes: evidence or masks in, weights and units out, by rules, prices and budgets."""
