"""Figures of images and models by the field's standard means, and reports of them."""
