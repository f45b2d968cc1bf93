"""One machine's loop, and what each mode measures."""
