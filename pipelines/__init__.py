"""What runs where: recipes, the Ray graph, the command line, the report."""
