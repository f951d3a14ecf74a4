"""World models, one folder each."""
