"""The coordinator of a consortium."""
