"""Sources of the documentation: README's table of equations (`python -m docs.equations`)."""
