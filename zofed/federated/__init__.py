"""Rounds over Flower: the only package that imports flwr."""
