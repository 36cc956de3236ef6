"""Multiplicative gates on structures (BMRS): formulas, noise, rules, training and report."""
