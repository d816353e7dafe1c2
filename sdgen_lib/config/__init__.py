"""What a run depends on: the settings, the recipes, a notebook's parameters, error messages, the published numbers."""
