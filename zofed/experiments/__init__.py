"""Many runs from one file, and what finished runs say."""
