"""Pages about measured files: what people read, print and publish. Measures nothing."""
