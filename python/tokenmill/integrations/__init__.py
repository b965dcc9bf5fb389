"""Integrations with other libraries. Each module imports its library on import."""
