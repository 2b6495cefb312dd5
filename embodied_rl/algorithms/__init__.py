"""One file per method: its `Config` with the method's defaults over the shared blocks."""
