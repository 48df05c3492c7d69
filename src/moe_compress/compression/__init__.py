"""Running a recipe: dry run, measuring, planning, surgery and weight stages."""
