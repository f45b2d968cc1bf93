"""Errors, texts, files, processes and this machine: what everything else stands on."""
