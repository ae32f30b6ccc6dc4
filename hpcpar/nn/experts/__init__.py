"""Mixtures of experts: served to whoever calls them, or as a layer that all ranks compute together."""
