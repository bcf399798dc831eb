"""How scans and reports come in, and how results go out."""
