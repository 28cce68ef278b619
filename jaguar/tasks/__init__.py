"""Tasks: labelled text in, prompts and options out."""
