"""The SGLang extension. The only package here that imports SGLang; importing it alone does not."""

#: The SGLang release that it extends.
SGLANG_VERSION = "0.5.23"
