"""The agent at one imaging site."""
