"""The `lors` command."""
