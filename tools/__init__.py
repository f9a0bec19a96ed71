"""Small commands: check data, inspect and export weights, make the tiny parts, figures, tables of results."""
