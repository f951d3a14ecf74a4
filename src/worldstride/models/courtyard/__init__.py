"""The world model that ships inside the package."""
