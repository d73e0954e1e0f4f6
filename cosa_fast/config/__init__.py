"""The configuration.

schema: the frozen dataclasses, and what one field alone cannot show
reading: YAML within bounds, and values as messages show them
parsing: YAML and key=value overrides into them, strictly
"""
