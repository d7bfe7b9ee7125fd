"""Planned memory: what is counted, that limits are kept or refused, and that real runs need what was planned."""
