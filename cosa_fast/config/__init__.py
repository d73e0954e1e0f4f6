"""The configuration.

schema: the frozen dataclasses, and what one field alone cannot show
parsing: YAML and key=value overrides into them, strictly
"""
