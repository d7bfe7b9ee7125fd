"""The parts of `compare_methods.py`: what all arms share, the arms, and the report."""
