"""Pages: one look for all that is shown: colours of methods, charts, tables, a page around them. Knows no model."""
