"""The prompt: policies and functions that make it shorter, or read less of it."""
