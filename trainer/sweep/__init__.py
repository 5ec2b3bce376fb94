"""``reft sweep``: a search over positions, layers, tying, rank and learning rate, by Optuna."""
