"""Keys, SuperLink, SuperNode and their processes on real machines."""
