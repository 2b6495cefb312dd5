"""Tiny envs with known answers, named by path in recipes (`env: {type: tests/toys/point.py}`)."""
