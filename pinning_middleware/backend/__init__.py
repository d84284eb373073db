"""How the package is wired into Django's database backends and drivers."""
