"""Conversations: chat templates, and one sequence whose cache continues from turn to turn."""
