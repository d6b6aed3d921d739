"""Sources of the documentation and of its site (`python -m docs.site`)."""
