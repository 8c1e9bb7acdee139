"""Anchor operators: attention and experts, each captured as a whole so that passes can find and rewrite it."""
