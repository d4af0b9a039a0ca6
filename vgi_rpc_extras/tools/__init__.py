"""Tools around workers; each module is loaded when it is needed."""
