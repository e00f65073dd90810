"""Model integration: find the experts of a model, train a chosen few of them, at full speed."""
