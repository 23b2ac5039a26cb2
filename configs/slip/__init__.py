"""SLIP's published results."""
