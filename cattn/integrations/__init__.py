"""cattn inside other libraries: a module for each, imported by nothing here; each needs its library."""
