"""The only place that knows llama.cpp: its source, its build, its tools, its libraries."""
