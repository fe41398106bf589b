"""The demo: a real small model, served with a fixed KV budget and replayed."""
