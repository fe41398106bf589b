"""The SGLang extension. The only package here that imports SGLang; importing it alone does not."""
