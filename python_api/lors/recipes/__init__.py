"""Recipes: what a user asks for, checked. Knows no method but by its declaration, and opens no model."""
