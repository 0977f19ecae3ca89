"""Describe a merge: recipes to YAML and back, mergekit's recipes, schedules over modules, scales and overrides."""
