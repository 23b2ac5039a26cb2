"""DeCLIP's released models."""
