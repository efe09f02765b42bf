"""The command zone-bundle: one module for each group of verbs."""
