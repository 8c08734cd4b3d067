"""Graft, the application: its middle knows no HTTP and is shared by the API and the worker."""
