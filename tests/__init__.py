"""The tests of hpcpar; conftest.py says how they run, matrix.py on what."""
