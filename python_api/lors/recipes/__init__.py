"""Recipes: what a user asks for, checked. Knows a method by its declaration alone, and opens no model."""
