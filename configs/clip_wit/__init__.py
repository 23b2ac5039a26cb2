"""CLIP's nine models."""
