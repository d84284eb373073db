"""Optional integrations with other packages. None is imported unless a site does so."""
