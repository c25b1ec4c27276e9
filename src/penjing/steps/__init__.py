"""The steps: one technique a file, each a frozen dataclass whose fields are its options."""
